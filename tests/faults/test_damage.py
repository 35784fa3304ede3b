"""Damaged files of checkpoints, and other meshes, as docs/reliability.md promises."""

import collections
import random
import shutil

import jax
import numpy as np
import pytest

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.saved_step import StepMeta
from llama_jax.errors import UserError
from tests.helpers import (
    TINY,
    flip_bit,
    made_state,
    mesh_of,
    random_batch,
    random_params,
    restored_state,
    shared_step,
)

MESHES = {
    "8 devices": (2, 2, 1, 2),
    "4": (1, 2, 1, 2),
    "1": (1, 1, 1, 1),
    "8 with two axes swapped": (2, 1, 2, 2),
}


def state_of(step):
    return made_state(TINY, random_params(TINY.model, seed=step), step)


def shardings(name):
    mesh = mesh_of(MESHES[name])
    with jax.set_mesh(mesh):
        return shared_step(TINY, mesh).state_shardings


def loss_of(state, name):
    """Returns the loss of one batch on this mesh."""
    mesh = mesh_of(MESHES[name])
    with jax.set_mesh(mesh):
        compiled = shared_step(TINY, mesh)
        batch = jax.device_put(random_batch(TINY, 0), compiled.batch_sharding)
        loss_sum, weight_sum = jax.device_get(compiled.evaluate(state.params, batch))
        return loss_sum / weight_sum


def save(workdir, state, step):
    with Checkpointer(workdir, TINY) as saver:
        saver.save(state.to_items(), StepMeta(TINY, step, "made up", b"tokenizer"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Writes steps 4 and 8, saved on 8 devices."""
    workdir = tmp_path_factory.mktemp("damage") / "run"
    for step in (4, 8):
        save(workdir, jax.device_put(state_of(step), shardings("8 devices")), step)
    return workdir


def files_of(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def restored(workdir):
    """Returns the step from which a run would go on, and its state."""
    with Checkpointer(workdir, TINY) as saver:
        step = saver.newest_good_step()
        return step, restored_state(saver, step, TINY, shardings("1"))


def is_found(workdir, path, capsys):
    """Returns whether damage to a file of step 8 is reported by name, and step 4 used instead."""
    name = path.relative_to(workdir / "checkpoints" / "8").as_posix()
    capsys.readouterr()
    with Checkpointer(workdir, TINY) as saver:
        step = saver.newest_good_step()
    said = capsys.readouterr().out
    aside = workdir / "checkpoints" / "8.damaged"
    found = step == 4 and f"damaged checkpoint 8: {name} " in said and aside.exists()
    if aside.exists():
        aside.rename(workdir / "checkpoints" / "8")
    return found


@pytest.mark.parametrize("flips", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_flipped_bits(saved, tmp_path, capsys, flips):
    """Random bits of random files are flipped: each flip is noticed, none is restored."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    files, choose = files_of(workdir, 8), random.Random(flips)
    found = collections.Counter()
    for _ in range(flips):
        path = choose.choice([path for path in files if path.stat().st_size])
        position = choose.randrange(8 * path.stat().st_size)
        flip_bit(path, position)
        found[is_found(workdir, path, capsys)] += 1
        flip_bit(path, position)
    print(f"flipped bits found: {found[True]} of {flips}, over {len(files)} files")
    assert found == {True: flips}
    flip_bit(path, position)
    step, state = restored(workdir)
    assert step == 4
    jax.tree.map(np.testing.assert_array_equal, state, state_of(4))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def delete(path):
    path.unlink()


@pytest.mark.parametrize("harm", [cut, empty, zero, delete])
def test_every_file_cut_emptied_zeroed_or_deleted(saved, tmp_path, capsys, harm):
    workdir = shutil.copytree(saved, tmp_path / "run")
    files = [path for path in files_of(workdir, 8) if path.stat().st_size]
    assert len(files) > 15
    missed = []
    for path in files:
        good = path.read_bytes()
        harm(path)
        if not is_found(workdir, path, capsys):
            missed.append(path)
        path.write_bytes(good)
    assert missed == []
    assert restored(workdir)[0] == 8
    print(f"{harm.__name__}: found for {len(files)} of {len(files)} files")


def partial(folder):
    """Deletes half of the files, like a copy that was interrupted."""
    for path in files_of(folder.parent.parent, 8)[::2]:
        path.unlink()


def half_deleted(folder):
    """Deletes two folders, like a deletion by an older version that was killed."""
    shutil.rmtree(folder / "meta")
    shutil.rmtree(folder / "params" / "d")


def hollow(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("harm", [partial, half_deleted, hollow])
def test_a_folder_that_is_not_whole(saved, tmp_path, capsys, harm):
    workdir = shutil.copytree(saved, tmp_path / "run")
    harm(workdir / "checkpoints" / "8")
    step, state = restored(workdir)
    assert step == 4
    assert "damaged checkpoint 8: " in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, state, state_of(4))


def test_what_interrupted_saves_and_deletions_leave(saved, tmp_path, capsys):
    workdir = shutil.copytree(saved, tmp_path / "run")
    folder = workdir / "checkpoints"
    names = ("12.saving", "12.saving.orbax-checkpoint-tmp", "16.orbax-checkpoint-tmp", "2.deleting")
    for name in names:
        shutil.copytree(folder / "8", folder / name)
    assert restored(workdir)[0] == 8
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]
    assert "cleaned 4 unfinished" in capsys.readouterr().out


def test_when_all_is_damaged_nothing_is_touched(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    for step in (4, 8):
        cut(max(files_of(workdir, step), key=lambda path: path.stat().st_size))
    before = [(path, path.stat().st_mtime_ns) for path in sorted(workdir.rglob("*/*/*"))]
    with pytest.raises(UserError, match="no good checkpoint is left"):
        restored(workdir)
    assert before == [(path, path.stat().st_mtime_ns) for path in sorted(workdir.rglob("*/*/*"))]


def test_from_8_devices_to_4_to_1_and_back(saved, tmp_path):
    """Each mesh restores what the one before saved, with the same bits and the same fingerprint."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    expected = state_of(8)
    prints, losses = fingerprint(expected), [loss_of(expected, "8 devices")]
    for step, mesh in enumerate(("4", "1", "8 with two axes swapped", "8 devices"), start=8):
        with Checkpointer(workdir, TINY) as saver:
            assert saver.newest_good_step() == step
            state = restored_state(saver, step, TINY, shardings(mesh))
        assert len(state.params["embed"].sharding.device_set) == int(mesh.split()[0])
        assert fingerprint(state) == prints
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)
        losses.append(loss_of(state, mesh))
        save(workdir, state, step + 1)
    apart = max(losses) - min(losses)
    print(f"4 of 4 states are equal; their losses of one batch ({losses[0]:.4f}) differ by {apart}")
    assert losses[-1] == losses[0] and apart < 2e-6  # float32 sums in another order
