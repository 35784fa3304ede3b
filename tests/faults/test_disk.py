"""A disk that is full, read-only, missing or slow, as docs/reliability.md promises."""

import contextlib
import json
import re
import resource
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint import manifest, saving
from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.events import Events
from llama_jax.checkpoint.saved_step import StepMeta, check_steps
from llama_jax.errors import UserError
from llama_jax.train import loop
from llama_jax.train import run as run_lib
from llama_jax.train.run import train
from tests.helpers import ROOT, TINY, made_state, random_params, records, replace, until

pytestmark = pytest.mark.usefixtures("shared_steps")

# The run saves at 2, 4, .. 12; the fault begins in step 6 and ends in step 9.
CONFIG = replace(TINY, train__steps=12, train__checkpoint_every=2, train__eval_every=100)


def mount(*arguments):
    """Returns whether the mount succeeded; it needs root."""
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


class FullDisk:
    """A tmpfs of 8 MB over the whole work directory, filled up to the last `left` bytes."""

    reason = "No space left|the disk has 0.00 GB free"

    def __init__(self, workdir, left):
        self.ballast, self.left = workdir / "ballast", left
        self.mounted = mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", workdir)
        self.limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not self.mounted:
            self.reason = "File too large"

    def begin(self):
        if not self.mounted:  # Without root: no file may grow beyond this size.
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, self.limit[1]))
            return
        with contextlib.suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with self.ballast.open("r+b") as file:
            file.truncate(max(0, self.ballast.stat().st_size - self.left))

    def end(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limit)
        self.ballast.unlink(missing_ok=True)


class ReadOnly:
    """The folder of checkpoints, mounted over itself, becomes read-only."""

    reason = "Read-only file system"

    def __init__(self, workdir):
        self.folder = workdir / "checkpoints"
        self.folder.mkdir()
        self.mounted = mount("--bind", self.folder, self.folder)
        if not self.mounted:
            self.reason = "Permission denied"

    def begin(self):
        if self.mounted:
            assert mount("-o", "remount,bind,ro", self.folder)
        else:
            self.folder.chmod(0o555)

    def end(self):
        if self.mounted:
            assert mount("-o", "remount,bind,rw", self.folder)
        else:
            self.folder.chmod(0o755)


class Lost:
    """A file takes the place of the folder of checkpoints, or of the whole work directory."""

    reason = "File exists|Not a directory"

    def __init__(self, folder):
        self.folder, self.away = folder, folder.with_name("away")

    def begin(self):
        self.folder.rename(self.away)
        self.folder.write_text("")

    def end(self):
        self.folder.unlink()
        self.away.rename(self.folder)


FAULTS = {
    "full": lambda workdir: FullDisk(workdir, 0),
    "fills up": lambda workdir: FullDisk(workdir, 500_000),
    "read-only": ReadOnly,
    "lost": lambda workdir: Lost(workdir / "checkpoints"),
    "all lost": Lost,
}


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    yield folder
    for path in (folder / "checkpoints", folder):
        subprocess.run(["umount", path], capture_output=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return jax.device_get(train(CONFIG, tmp_path_factory.mktemp("twin") / "run"))


def during(monkeypatch, workdir, first, begin, last, end):
    """Calls `begin` at batch `first` and `end` at batch `last`, while no save is running."""
    # Wait until the newest step is saved and the one that it replaces is removed, so that a full
    # disk stays full.
    kept = {str(step) for step in range(2, first, 2)[-CONFIG.train.keep_checkpoints :]}
    stream, folder = loop.device_batches, workdir / "checkpoints"
    warn, failed = Checkpointer._warn, set()

    def warned(saver, step, reason):
        warn(saver, step, reason)
        failed.add(step)

    def disturbed(source, start, *rest):
        for step, batch in enumerate(stream(source, start, *rest), start=start + 1):
            if step == first:
                until(lambda: {path.name for path in folder.iterdir()} == kept)
                begin()
            if step == last:
                until(lambda: (last - 1) // 2 * 2 in failed)
                end()
            yield batch

    monkeypatch.setattr(loop, "device_batches", disturbed)
    monkeypatch.setattr(Checkpointer, "_warn", warned)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from orbax itself
@pytest.mark.parametrize(
    "kind",
    [
        *("full", "read-only", "all lost"),
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fills up", "lost")),
    ],
)
def test_training_goes_on(kind, workdir, undisturbed, monkeypatch, capsys):
    """Steps 6 and 8 cannot be saved; the run ends with the same bits as one without a fault."""
    fault = FAULTS[kind](workdir)
    during(monkeypatch, workdir, 6, fault.begin, 9, fault.end)
    state = jax.device_get(train(CONFIG, workdir))
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed)
    said = capsys.readouterr().out
    warnings = re.findall("warning: saving .*", said)
    print(*warnings, sep="\n")
    for step, line in zip((6, 8), warnings, strict=True):
        assert f"saving step {step} to {workdir}/checkpoints failed: " in line
        assert any(reason in line for reason in fault.reason.split("|")), line
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert names == ["10", "12", "4"]
    assert not any(reason for _, reason in check_steps(epath.Path(workdir)))
    assert [line["step"] for line in records(workdir) if "loss" in line] == list(range(1, 13))
    assert json.loads((workdir / "goodput.json").read_text())["saved_at_end"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_run_ends_by_policy_and_goes_on_from_the_last_good_step(
    workdir, undisturbed, monkeypatch, capsys
):
    fault = FAULTS["full"](workdir)
    with monkeypatch.context() as patch:
        during(patch, workdir, 6, fault.begin, 99, None)
        with pytest.raises(UserError, match=r"saving to .* failed: .*step 4 is the newest"):
            train(replace(CONFIG, train__max_failed_saves=1), workdir)
    fault.end()
    state = jax.device_get(train(replace(CONFIG, train__max_failed_saves=1), workdir))
    assert "resume  from step 4" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_last_save_must_work(workdir, monkeypatch):
    fault = FAULTS["full"](workdir)
    during(monkeypatch, workdir, 11, fault.begin, 99, None)
    with pytest.raises(UserError, match=r"saving to .* failed: .*step 10 is the newest"):
        train(CONFIG, workdir)


def events(workdir):
    """Returns (step, kind of event) of each record in the log."""
    return [(line["step"], line.get("event")) for line in records(workdir)]


def test_a_disk_that_stalls(workdir, undisturbed, monkeypatch, capsys):
    """The save of step 6 outlasts step 7 and its limit: training goes on, the next save waits."""
    write, say, said = manifest.write, Events.say, []

    def stalls(folder):
        if folder.name.startswith("6."):
            until(lambda: {(7, None), (6, "save_slow")} <= set(events(workdir)))
            until(lambda: any(text.startswith("waiting for the save of step 6") for text in said))
        write(folder)

    monkeypatch.setattr(manifest, "write", stalls)
    monkeypatch.setattr(Events, "say", lambda s, text: (said.append(text), say(s, text)))
    monkeypatch.setattr(saving, "QUIET_S", 0.2)
    state = jax.device_get(train(replace(CONFIG, train__save_timeout=1), workdir))
    jax.tree.map(np.testing.assert_array_equal, state, undisturbed)
    out = capsys.readouterr().out
    assert f"warning: saving step 6 to {workdir}/checkpoints takes longer than 1 s" in out
    assert "waiting for the save of step 6, begun " in out
    lines = events(workdir)
    assert lines.count((6, "save_slow")) == 1
    assert lines.index((6, "save_slow")) < lines.index((9, None))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["10", "12", "8"]


HANGS = """
import sys, threading
from llama_jax.checkpoint import manifest, saving
from llama_jax.train.run import train
from tests.faults.test_disk import CONFIG
from tests.helpers import replace
saving.QUIET_S = 1
manifest.write = lambda folder: threading.Event().wait()
every = int(sys.argv[2])
train(replace(CONFIG, train__checkpoint_every=every, train__step_timeout=20), sys.argv[1])
"""
BROKEN = """
from llama_jax.train.rewind import Rewinder
steps = []
def stuck(self):
    steps.append(None)
    if len(steps) == 10:
        raise KeyError
    return 0
Rewinder.take_skipped_in_a_row = stuck
"""


@pytest.mark.slow  # it starts three processes
@pytest.mark.parametrize(
    ("code", "every", "step", "where"),
    [
        (HANGS, 4, 4, "saving step 8"),
        (HANGS, 12, 12, "the last save"),
        (BROKEN + HANGS, 8, 8, "step 10"),  # an error is raised, and the exit hangs
    ],
)
def test_a_disk_that_never_answers(tmp_path, code, every, step, where):
    """The run reports which save it waits for, and the watchdog ends it, wherever it waits."""
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(every)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert re.search(rf"waiting for the save of step {step}, begun \d+ s ago", done.stdout)
    assert f"error: no sign of life in {where} for longer than 20 s" in done.stderr


def test_a_console_that_is_full_ends_no_save(tmp_path, monkeypatch):
    """A failed save is reported and cleaned up, also where stdout is on the same full disk."""
    printed = []

    def full(*text, **_):
        printed.append(" ".join(map(str, text)))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    monkeypatch.setattr("builtins.print", full)
    state = made_state(TINY, random_params(TINY.model), 3)
    with Checkpointer(tmp_path, TINY) as saver:
        saver.save(state.to_items(), StepMeta(TINY, 3, "made up", b""))
        with pytest.raises(UserError, match="No space left"):
            saver.wait()
        assert list((tmp_path / "checkpoints").iterdir()) == []
        monkeypatch.undo()
        saver.save(state.to_items(), StepMeta(TINY, 3, "made up", b""))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert "saving step 3" in "".join(printed)


def test_a_place_that_is_read_only_is_told_before_the_first_step(workdir, monkeypatch):
    fault = ReadOnly(workdir)
    fault.begin()
    monkeypatch.setattr(run_lib, "run_loop", lambda *_: pytest.fail("it started"))
    began = time.monotonic()
    with pytest.raises(
        UserError, match=f"cannot be saved to {workdir}/checkpoints: .*{fault.reason}"
    ) as caught:
        train(CONFIG, workdir)
    print(f"told after {time.monotonic() - began:.2f} s: {caught.value}")
    fault.end()
