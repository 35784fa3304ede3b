import errno
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from llama_jax.data.batches import Batches
from llama_jax.data.loader import device_batches, host_batches, local_rows, made_ahead
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.errors import UserError
from llama_jax.parallel.sharding import batch_sharding
from tests.helpers import mesh_of, text_config

T, BATCH = 16, 8


@pytest.fixture(scope="module")
def batches(shards):
    return Batches({"": TokenDataset.open(shards, "train")}, T, BATCH, seed=0)


@pytest.fixture(scope="module")
def packed(corpus, tmp_path_factory):
    """Prepares three sources of packed documents."""
    source = f"a={corpus}/00*.txt; b={corpus}/01*.txt,{corpus}/02*.txt; c={corpus}/03*.txt"
    folder = tmp_path_factory.mktemp("packed") / "best_fit"
    config = text_config(source, data__packing="best_fit", train__seq_len=T)
    prepare(config, folder, log=lambda line: None)
    return {name: TokenDataset.open(folder / name, "train") for name in "abc"}


def test_going_on_at_a_step_gives_the_same_batches(batches):
    whole = list(host_batches(batches, range(BATCH), 0, 12))
    assert len(whole) == 12
    for step, batch in enumerate(host_batches(batches, range(BATCH), 7, 12), start=7):
        for name, value in batch.items():
            np.testing.assert_array_equal(value, whole[step][name])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)])
def test_device_batches_lie_where_the_step_wants_them(batches, shape):
    mesh = mesh_of(shape)
    sharding = batch_sharding(mesh)
    found = list(device_batches(batches, 2, 5, sharding, BATCH, T))
    assert len(found) == 3
    for step, batch in enumerate(found, start=2):
        expected = batches.rows(step, range(BATCH))
        for name, value in batch.items():
            assert value.sharding == sharding
            np.testing.assert_array_equal(value, expected[name])


def test_local_rows_of_one_process_are_all():
    assert local_rows(batch_sharding(mesh_of((2, 2, 1, 2))), BATCH, T) == range(BATCH)


class FakeSharding:
    """A sharding with some of the rows on this process."""

    def __init__(self, *spans):
        self._spans = spans

    def addressable_devices_indices_map(self, shape):
        return {n: (slice(*span), slice(None)) for n, span in enumerate(self._spans)}


def test_local_rows_of_a_process_are_its_own():
    assert local_rows(FakeSharding((2, 4), (2, 4), (4, 6)), 8, T) == range(2, 6)
    with pytest.raises(UserError, match="not contiguous"):
        local_rows(FakeSharding((0, 2), (4, 6)), 8, T)


def test_a_damaged_shard_is_a_clear_error_through_tf_data(batches):
    def damaged(step, rows):
        if step == 2:
            raise UserError("train-00001.bin is damaged")
        return batches.rows(step, rows)

    found = made_ahead(damaged, range(BATCH), 0, 5, 2)
    with pytest.raises(UserError, match=r"^train-00001.bin is damaged$"):
        for _ in range(3):
            next(found)


def test_no_tuner_is_left_to_sleep_at_the_end(batches, monkeypatch):
    """tf.data's autotuner rarely delays the end of an iteration, by 9 s: check that it is off."""
    import tensorflow as tf

    tuned, numpy_iterator = [], tf.data.Dataset.as_numpy_iterator

    def as_numpy_iterator(dataset):
        tuned.append(dataset.options().autotune.enabled)
        return numpy_iterator(dataset)

    monkeypatch.setattr(tf.data.Dataset, "as_numpy_iterator", as_numpy_iterator)
    assert len(list(host_batches(batches, range(BATCH), 0, 3))) == 3
    assert tuned == [False]


def test_a_shard_that_is_cut_while_it_is_read(shards, tmp_path):
    """Tokens that an open file has lost must not become padding of weight 0."""
    folder = shutil.copytree(shards, tmp_path / "shards")
    batches = Batches({"": TokenDataset.open(folder, "train")}, T, BATCH, seed=0)
    found = host_batches(batches, range(BATCH), 0, 100)
    next(found)
    for path in folder.glob("train-*.bin"):
        os.truncate(path, 101)  # 50 tokens and a half
    with pytest.raises(UserError, match=r"train-00000-00\d.bin ends early: it is damaged"):
        for _ in range(5):
            next(found)


@pytest.mark.parametrize("kind", ["bin", "pack"])
def test_a_disk_that_gives_up_names_the_file(packed, monkeypatch, kind):
    """The system returns EIO in a thread of TensorFlow."""
    pread, broken = os.pread, []

    def fails(file, size, offset):
        if broken and os.readlink(f"/proc/self/fd/{file}").endswith(kind):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", fails)
    found = host_batches(Batches(packed, T, BATCH, seed=0), range(BATCH), 0, 100)
    next(found)
    broken.append(True)
    name = rf"best_fit/[abc]/train-\d{{5}}-\d{{3}}.{kind}"
    with pytest.raises(UserError, match=rf"^cannot read .*{name}: Input/output error; once"):
        for _ in range(5):
            next(found)


def test_only_shards_need_tensorflow():
    code = (
        "import sys, jax, llama_jax.train\n"
        "from llama_jax.data.batches import SyntheticBatches\n"
        "from llama_jax.data.loader import device_batches\n"
        "from llama_jax.data.source import BatchSource\n"
        "from llama_jax.config import MeshConfig\n"
        "from llama_jax.parallel.mesh import make_mesh\n"
        "from llama_jax.parallel.sharding import batch_sharding\n"
        "class Own(BatchSource):\n"
        "    def rows(self, step, rows):\n"
        "        return SyntheticBatches(64, 16, 8, 0).rows(step, rows)\n"
        "sharding = batch_sharding(make_mesh(MeshConfig()))\n"
        "for source in SyntheticBatches(64, 16, 8, 0), Own():\n"
        "    assert len(list(device_batches(source, 0, 3, sharding, 8, 16))) == 3\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
    assert jax.device_count() == 8
