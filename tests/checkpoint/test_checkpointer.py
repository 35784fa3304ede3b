"""Saving, failed saves, and damaged steps."""

import dataclasses
import json
import shutil
import threading

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint import manifest, retention, saving
from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.events import Events
from llama_jax.checkpoint.saved_step import DamagedCheckpoint, StepMeta
from llama_jax.checkpoint.saving import BackgroundSaves
from llama_jax.errors import UserError
from tests.helpers import TINY, flip_bit, made_state, replace, restored_state

CONFIG = replace(TINY, train__keep_checkpoints=2)
META = StepMeta(CONFIG, 0, "data-1", b"tokenizer")
FULL = OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def state():
    return made_state(CONFIG)


def save(saver, state, *steps, **changes):
    for step in steps:
        saver.save(state.to_items(), dataclasses.replace(META, step=step, **changes))


def noted_events():
    """Returns a list, and an `on_event` function that adds its arguments to it."""
    noted = []
    return noted, lambda step, text, record: noted.append((step, text, record))


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def two_steps(state, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    with Checkpointer(workdir, CONFIG) as saver:
        save(saver, state, 4, 8)
    return workdir


@pytest.fixture
def run(two_steps, tmp_path):
    """Copies a work directory with steps 4 and 8."""
    return shutil.copytree(two_steps, tmp_path / "run")


def test_the_newest_are_kept(state, tmp_path):
    with Checkpointer(tmp_path, CONFIG) as saver:
        save(saver, state, 1, 2, 10)
        assert saver.latest_step() == 10
    assert names(tmp_path) == ["10", "2"]


def test_the_best_is_kept(state, tmp_path):
    config = replace(CONFIG, train__keep_checkpoints=1, train__keep_best=1)
    with Checkpointer(tmp_path, config) as saver:
        for step, loss in ((1, 2.0), (2, 1.5), (3, 1.7), (4, None)):
            save(saver, state, step, eval_loss=loss)
    assert names(tmp_path) == ["2", "4"]


def test_the_rename_is_the_last_act(state, tmp_path, monkeypatch):
    write = manifest.write
    seen = []

    def spy(folder):
        items = ("params", "optimizer", "meta", "tokenizer", "_CHECKPOINT_METADATA")
        assert all((folder / item).exists() for item in items)
        seen.append((folder.name, names(tmp_path)))
        write(folder)

    monkeypatch.setattr(manifest, "write", spy)
    saver = Checkpointer(tmp_path, replace(CONFIG, train__keep_checkpoints=1))
    save(saver, state, 3, 5)
    saver.close()
    # An old step is removed when the new one is complete.
    assert seen == [
        ("3.saving", ["3.saving"]),
        ("5.saving", ["3", "5.saving"]),
    ]
    assert names(tmp_path) == ["5"]
    assert manifest.first_damage(epath.Path(tmp_path / "checkpoints" / "5")) == ""
    assert (tmp_path / "checkpoints" / "5" / "manifest.json").exists()


@pytest.mark.parametrize("limit", [0, 2])
def test_failed_saves(state, run, monkeypatch, capsys, limit):
    """At most max_failed_saves failures in a row are tolerated; a success resets the count."""
    noted, on_event = noted_events()
    saver = Checkpointer(run, replace(CONFIG, train__max_failed_saves=limit), on_event)

    def full(*_, **__):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(saver._background._orbax, "save", full)
        save(saver, state, *range(9, 9 + limit))
    save(saver, state, 20)
    saver.wait()
    monkeypatch.setattr(saver._background._orbax, "save", full)
    save(saver, state, *range(21, 21 + limit))
    with pytest.raises(UserError, match=r"No space left on device; earlier .*step 20 is the new"):
        save(saver, state, 30)
    assert saver.latest_step() == 20
    with pytest.raises(UserError, match="No space left"):
        saver.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert len(lines) == 2 * limit + 1
    assert f"saving step 30 to {run}/checkpoints failed: [Errno 28] No space left" in lines[-1]
    assert f"({limit + 1} failed in a row, train.max_failed_saves={limit})" in lines[-1]
    assert [text for _, text, _ in noted] == lines
    failed = {"event": "save_failed", "reason": "[Errno 28] No space left on device"}
    assert [record for _, _, record in noted] == [failed] * (2 * limit + 1)
    assert noted[-1][0] == 30


def test_a_save_that_fails_in_the_background(state, run, monkeypatch, capsys):
    saver = Checkpointer(run, CONFIG)

    def full(folder):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        save(saver, state, 12)
        saver._background.join()
    # The failure is reported at once, and leaves no files on the full disk.
    assert "warning: saving step 12" in capsys.readouterr().out
    assert names(run) == ["4", "8"]
    save(saver, state, 16)
    saver.close()
    assert names(run) == ["16", "8"]


def test_what_a_failed_save_could_not_free_is_freed_by_the_next(state, run, monkeypatch):
    """Another process writes into its folder while it is removed."""
    saver, rmtree = Checkpointer(run, CONFIG), type(epath.Path(run)).rmtree

    def busy(path, missing_ok=False):
        if path.name == "12.saving":
            raise OSError(39, "Directory not empty")
        rmtree(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", lambda folder: (_ for _ in ()).throw(FULL))
        patch.setattr(type(epath.Path(run)), "rmtree", busy)
        save(saver, state, 12)
        saver._background.join()
    assert names(run) == ["12.saving", "4", "8"]
    save(saver, state, 16)
    saver.close()
    assert names(run) == ["16", "8"]


def test_the_last_save_must_not_fail(state, run, monkeypatch):
    saver = Checkpointer(run, CONFIG)
    monkeypatch.setattr(manifest, "write", lambda folder: (_ for _ in ()).throw(FULL))
    save(saver, state, 12)
    with pytest.raises(UserError, match="No space left on device"):
        saver.close()
    assert names(run) == ["4", "8"]


def test_a_disk_that_is_too_small_is_not_written_to(state, run, monkeypatch, capsys):
    usage = shutil.disk_usage("/")
    saver = Checkpointer(run, CONFIG)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(saver._background._orbax, "save", lambda *_, **__: pytest.fail("written"))
    save(saver, state, 12)
    assert "the step takes 0.00 GB, the disk has 0.00 GB free" in capsys.readouterr().out
    with pytest.raises(UserError, match="the disk has 0.00 GB free"):
        saver.close()


def test_a_bug_is_not_taken_for_a_full_disk(state, run, monkeypatch):
    saver = Checkpointer(run, CONFIG)
    monkeypatch.setattr(manifest, "write", lambda: None)
    save(saver, state, 12)
    with pytest.raises(TypeError):
        saver.close()


def test_an_error_elsewhere_does_not_lose_the_save_before_it(state, run, monkeypatch):
    write, join, gate = manifest.write, BackgroundSaves.join, threading.Event()
    monkeypatch.setattr(manifest, "write", lambda folder: (gate.wait(), write(folder)))
    with pytest.raises(KeyError), Checkpointer(run, CONFIG) as saver:
        save(saver, state, 12)
        monkeypatch.setattr(BackgroundSaves, "join", lambda save: (gate.set(), join(save))[1])
        raise KeyError
    assert names(run) == ["12", "8"]


@pytest.mark.parametrize("limit", [0, 1])
def test_a_slow_save_is_told(state, run, monkeypatch, capsys, limit):
    """A slow save is reported while it runs and by calls that wait for it; it is not a failure."""
    write, say, gate = manifest.write, Events.say, threading.Event()
    slow = f"warning: saving step 12 to {run}/checkpoints takes longer than 1 s "
    awaited = {"waiting for the save of step 12, begun ", slow if limit else "waiting"}
    said = []

    def noted(events, text):
        say(events, text)
        said.append(text)
        if all(any(text.startswith(start) for text in said) for start in awaited):
            gate.set()

    monkeypatch.setattr(manifest, "write", lambda folder: (gate.wait(), write(folder)))
    monkeypatch.setattr(saving, "QUIET_S", 0.1)
    monkeypatch.setattr(Events, "say", noted)
    events, on_event = noted_events()
    saver = Checkpointer(run, replace(CONFIG, train__save_timeout=limit), on_event)
    save(saver, state, 12, 16)
    out = capsys.readouterr().out
    assert "waiting for the save of step 12, begun " in out
    assert (slow in out) == bool(limit)
    monkeypatch.setattr(saving, "QUIET_S", 60)
    saver.close()
    assert capsys.readouterr().out == ""
    event = (12, {"event": "save_slow", "seconds": 1})
    assert [(step, record) for step, _, record in events] == [event] * limit
    assert names(run) == ["12", "16"]


def test_what_was_unfinished_is_cleaned_and_said(run, capsys):
    shutil.copytree(run / "checkpoints" / "8", run / "checkpoints" / "12.saving")
    (run / "checkpoints" / "2.deleting").mkdir()
    Checkpointer(run, CONFIG).close()
    assert "cleaned 2 unfinished checkpoint folder(s): 12.saving, 2.deleting" in (
        capsys.readouterr().out
    )
    assert names(run) == ["4", "8"]


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match=f"cannot be saved to {tmp_path}/checkpoints: .*exists"):
        Checkpointer(tmp_path, CONFIG)


def test_an_old_step_that_cannot_be_deleted_keeps_no_other(state, tmp_path, monkeypatch, capsys):
    """The error is reported once, and each save tries the removal again."""
    config = replace(CONFIG, train__keep_checkpoints=1)
    remove, tried = retention.remove, []

    def refuse(folder):
        tried.append(folder.name)
        if folder.name == "1":
            raise PermissionError(1, "Operation not permitted")
        return remove(folder)

    monkeypatch.setattr(retention, "remove", refuse)
    with Checkpointer(tmp_path, config) as saver:
        save(saver, state, 1, 2, 3, 4)
    assert names(tmp_path) == ["1", "4"]
    assert tried == ["1", "1", "2", "1", "3"]
    said = capsys.readouterr().out
    assert said.count("warning: an old checkpoint could not be deleted: [Errno 1]") == 1


# The newest undamaged step is used; damaged steps are set aside.


def restore(saver, step):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, made_state(CONFIG))
    return restored_state(saver, step, CONFIG, shardings)


def damage(run, step):
    path = max((run / "checkpoints" / str(step) / "params").rglob("d/*"), key=lambda p: p.name)
    flip_bit(path, 8 * (path.stat().st_size // 2))
    return path.relative_to(run / "checkpoints" / str(step)).as_posix()


def test_a_damaged_step_is_named_and_the_one_before_is_used(state, run, capsys):
    file = damage(run, 8)
    events, on_event = noted_events()
    with Checkpointer(run, CONFIG, on_event) as saver:
        assert saver.newest_good_step() == 4
        jax.tree.map(np.testing.assert_array_equal, restore(saver, 4), state)
        save(saver, state, 8)  # the name of step 8 is free again
    reason = f"{file} holds other bytes than were written"
    aside = run / "checkpoints" / "8.damaged"
    said = f"damaged checkpoint 8: {reason}; set aside as {aside}, going on from step 4"
    assert said in capsys.readouterr().out
    record = {"event": "checkpoint_damaged", "damaged_step": 8, "reason": reason}
    assert events == [(4, said, record)]
    assert names(run) == ["4", "8", "8.damaged"]


def test_damage_that_only_the_fingerprint_sees(state, run):
    """A bug or faulty hardware made the damage before the files were written."""
    path = run / "checkpoints" / "8" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["fingerprint"]["params/embed"] ^= 1
    path.write_text(json.dumps(meta))
    manifest.write(epath.Path(run / "checkpoints" / "8"))
    with Checkpointer(run, CONFIG) as saver:
        assert saver.newest_good_step() == 8
        with pytest.raises(
            DamagedCheckpoint, match="differs from what was saved: params/embed "
        ) as caught:
            restore(saver, 8)
        saver.mark_damaged(8, str(caught.value))
        assert saver.newest_good_step() == 4
    assert names(run) == ["4", "8.damaged"]


def test_no_good_step_is_an_error_and_changes_nothing(run):
    damage(run, 8)
    (run / "checkpoints" / "4" / "meta" / "metadata").unlink()
    before = {path: path.stat() for path in run.rglob("*")}
    for _ in range(2):  # the second time gives the same error
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
