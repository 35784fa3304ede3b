"""Finding the newest good step, and what happens to those that are not."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax import manifest
from llama_jax.checkpoint import DamagedCheckpoint, load_meta
from llama_jax.checkpointer import Checkpointer
from llama_jax.errors import UserError
from tests.helpers import flip_bit, made_state, records
from tests.test_checkpointer import CONFIG, META, names, save


@pytest.fixture(scope="module")
def state():
    return made_state(CONFIG)


@pytest.fixture(scope="module")
def two_steps(state, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    with Checkpointer(workdir, CONFIG) as saver:
        save(saver, state, 4, 8)
    return workdir


@pytest.fixture
def run(two_steps, tmp_path):
    """A work directory of one's own, with steps 4 and 8."""
    return shutil.copytree(two_steps, tmp_path / "run")


def restore(saver, step):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return saver.restore(step, jax.tree.map(lambda _: device, made_state(CONFIG)))


def damage(run, step):
    path = max((run / "checkpoints" / str(step) / "params").rglob("d/*"), key=lambda p: p.name)
    flip_bit(path, 8 * (path.stat().st_size // 2))
    return path.relative_to(run / "checkpoints" / str(step)).as_posix()


def test_a_damaged_step_is_named_and_the_one_before_is_used(state, run, capsys):
    file = damage(run, 8)
    with Checkpointer(run, CONFIG) as saver:
        assert saver.newest_good_step() == 4
        jax.tree.map(np.testing.assert_array_equal, restore(saver, 4), state)
        save(saver, state, 8)  # its name is free again
    reason = f"{file} holds other bytes than were written"
    aside = run / "checkpoints" / "8.damaged"
    said = f"damaged checkpoint 8: {reason}; set aside as {aside}, going on from step 4"
    assert said in capsys.readouterr().out
    assert records(run) == [
        {"step": 4, "event": "checkpoint_damaged", "damaged_step": 8, "reason": reason}
    ]
    assert names(run) == ["4", "8", "8.damaged"]


def test_damage_that_only_the_fingerprint_sees(state, run):
    """As from a bug, or a machine that computes wrong: the files are what was written."""
    path = run / "checkpoints" / "8" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["fingerprint"]["params/embed"] ^= 1
    path.write_text(json.dumps(meta))
    manifest.write(epath.Path(run / "checkpoints" / "8"))
    with Checkpointer(run, CONFIG) as saver:
        assert saver.newest_good_step() == 8
        with pytest.raises(
            DamagedCheckpoint, match="does not give back .*: params/embed "
        ) as caught:
            restore(saver, 8)
        saver.mark_damaged(8, str(caught.value))
        assert saver.newest_good_step() == 4
    assert names(run) == ["4", "8.damaged"]


def test_no_good_step_is_an_error_and_changes_nothing(run):
    damage(run, 8)
    (run / "checkpoints" / "4" / "meta" / "metadata").unlink()
    before = {path: path.stat() for path in run.rglob("*")}
    for _ in range(2):  # and again
        with Checkpointer(run, CONFIG) as saver:
            with pytest.raises(UserError, match=r"no good .*step 8: params/.*step 4: meta/meta"):
                saver.newest_good_step()
    after = {path: path.stat() for path in run.rglob("*")}
    assert {p: s.st_mtime_ns for p, s in before.items() if p.is_file()} == {
        p: s.st_mtime_ns for p, s in after.items() if p.is_file()
    }
    assert before.keys() == after.keys()


def test_nothing_saved_yet(tmp_path):
    with Checkpointer(tmp_path, CONFIG) as saver:
        assert saver.newest_good_step() is None


def test_a_step_of_a_version_without_manifests(state, run, capsys):
    folder = run / "checkpoints" / "8"
    (folder / "manifest.json").unlink()
    meta = json.loads((folder / "meta" / "metadata").read_text())
    del meta["fingerprint"], meta["eval_loss"]
    (folder / "meta" / "metadata").write_text(json.dumps(meta))
    assert load_meta(folder) == dataclasses.replace(META, step=8, device_kind="cpu")
    with Checkpointer(run, CONFIG) as saver:
        assert saver.newest_good_step() == 8
        jax.tree.map(np.testing.assert_array_equal, restore(saver, 8), state)
    assert "unverified checkpoint 8" in capsys.readouterr().out
