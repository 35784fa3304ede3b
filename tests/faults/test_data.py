"""Rows 14 to 16 of docs/reliability.md: token shards and text that are not as they should be."""

import errno
import os
import shutil

import jax
import numpy as np
import pytest

from llama_jax import train as train_lib
from llama_jax.errors import UserError
from llama_jax.train import train
from tests.faults.test_disk import until
from tests.helpers import one_line_error, start_train, text_config

# Saves at 2, 4, ..; the fault begins when batch 6 was handed out.
STEPS, FAULT = 12, 6


def config_on(shards):
    """A short run on prepared shards."""
    changes = {"train__steps": STEPS, "train__checkpoint_every": 2, "train__eval_every": 100}
    return text_config("elsewhere", data__path=str(shards), data__source="stdlib", **changes)


def cut(path):
    os.truncate(path, path.stat().st_size // 3)


def disk_fault(monkeypatch):
    """From now on the system reads nothing more from files."""

    def fails(file, size, offset):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fails)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    """The last state of a run that meets no fault."""
    return jax.device_get(train(config_on(shards), tmp_path_factory.mktemp("twin") / "run"))


@pytest.mark.parametrize("fault", ["cut", "EIO"])
def test_a_shard_is_lost_in_the_middle_of_a_run(shards, undisturbed, tmp_path, monkeypatch, fault):
    """The file is named; when it is mended the same command ends where an undisturbed one does."""
    folder = shutil.copytree(shards, tmp_path / "shards")
    stream = train_lib.stream

    def disturbed(source, start, *rest):
        for number, batch in enumerate(stream(source, start, *rest), start + 1):
            if number == FAULT and fault == "cut":
                for path in folder.glob("train-*.bin"):
                    cut(path)
            elif number == FAULT:
                disk_fault(patch)
            yield batch

    message = "ends early" if fault == "cut" else "Input/output error; when it can be read again"
    with monkeypatch.context() as patch:
        patch.setattr(train_lib, "stream", disturbed)
        with pytest.raises(UserError, match=rf"train-00000-00\d.bin.*{message}"):
            train(config_on(folder), tmp_path / "run")
    for path in shards.iterdir():
        shutil.copy2(path, folder)
    state = jax.device_get(train(config_on(folder), tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed)


def test_the_command_ends_with_one_line(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "shards")
    workdir = tmp_path / "run"
    flags = (f"--config.data.path={folder}", "--config.train.steps=100000")
    process = start_train("stdlib", workdir, *flags, devices=1)[0]
    log = workdir / "metrics.jsonl"
    until(lambda: log.exists() and log.stat().st_size, 300)
    for path in folder.glob("train-*.bin"):
        cut(path)
    process.stdout, process.stderr = process.communicate(timeout=60)
    assert "train-00000-00" in (line := one_line_error(process)) and "ends early" in line
