"""Stages, accepted changes and branches on one and two processes that are killed and resumed.

Each run ends with the bits of a twin that was not interrupted.
"""

import json
import signal

import pytest
from etils import epath

from llama_jax.checkpoint.saved_step import find_step, load_meta
from tests.faults.soak import losses
from tests.helpers import TINY_FLAGS, outputs_of, start

# First the batch grows, then the mixture changes, then the sequences become longer.
STAGES = (
    "until 4: train.seq_len=16 train.global_batch=8; "
    "until 9: train.seq_len=16 data.mixture=web=0.2,books=0.8"
)
STAGED = (
    f"--config.train.stages={STAGES}",
    *("--config.train.steps=13", "--config.train.seq_len=32", "--config.train.global_batch=16"),
)
KILL = (8, 6)  # in the middle of the second stage


def train(folder, workdir, *flags, processes=1, kill=None):
    """Trains on two devices until the end, or until the run is killed.

    Args:
      folder: the fixture `two_sources`.
      workdir: the work directory.
      *flags: further flags of the command.
      processes: number of processes.
      kill: the number of steps before all processes are killed, and the newest saved step then.

    Returns:
      The standard output of process 0.
    """
    environment = {}
    if kill:
        saved = workdir / "checkpoints" / str(kill[1])
        environment = {"KILL_AT": str(kill[0]), "KILL_SAVED": str(saved)}
    running = start(
        "tests.faults.changing_child",
        *TINY_FLAGS,
        f"--config.data.source=web={folder / 'web'};books={folder / 'books'}",
        *(f"--config.data.path={folder / 'shards'}", "--config.data.mixture=web=0.7,books=0.3"),
        *("--config.model.n_layers=1", "--config.train.log_every=1"),
        *("--config.train.checkpoint_every=3", "--config.train.eval_every=1000"),
        *(f"--workdir={workdir}", *flags),
        processes=processes,
        devices=2 // processes,
        **environment,
    )
    outputs = outputs_of(running)
    statuses = [process.returncode for process in running]
    if kill:
        assert -signal.SIGKILL in statuses and 0 not in statuses, outputs
        assert max(losses(workdir)) < kill[0] + 1
    else:
        assert set(statuses) == {0}, outputs
    return outputs[0][0]


def result(workdir):
    """Returns the loss of each step in hexadecimal, and the fingerprints of the last state."""
    meta = load_meta(find_step(epath.Path(workdir)))
    return {step: loss.hex() for step, loss in losses(workdir).items()}, meta.fingerprint


def changes_of(workdir):
    return [json.loads(line) for line in (workdir / "changes.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def staged(two_sources, tmp_path_factory):
    """Returns the result of the run with stages on one process that was not interrupted."""
    workdir = tmp_path_factory.mktemp("staged") / "run"
    train(two_sources, workdir, *STAGED)
    found, fingerprint = result(workdir)
    assert list(found) == list(range(1, 14)) and len(set(found.values())) == 13
    return found, fingerprint


@pytest.fixture(scope="module")
def staged_on_two(two_sources, tmp_path_factory):
    """Returns the result of the same run on two processes."""
    workdir = tmp_path_factory.mktemp("staged") / "run"
    train(two_sources, workdir, *STAGED, processes=2)
    return result(workdir)


@pytest.mark.slow  # the next test resumes on one process, too
def test_killed_in_the_second_stage(two_sources, staged, tmp_path):
    train(two_sources, tmp_path, *STAGED, kill=KILL)
    out = train(two_sources, tmp_path, *STAGED)
    assert "resume  from step 6" in out and out.count("stage   from step") == 1
    assert result(tmp_path) == staged
    assert not (tmp_path / "changes.jsonl").exists()


def test_two_processes_killed_in_the_second_stage_go_on_as_one(two_sources, staged, tmp_path):
    """Batches and losses are those of one process, before the kill and after it."""
    train(two_sources, tmp_path, *STAGED, processes=2, kill=KILL)
    out = train(two_sources, tmp_path, *STAGED)
    assert "resume  from step 6" in out
    assert result(tmp_path) == staged


@pytest.mark.slow  # it starts six processes
def test_two_processes_killed_in_the_second_stage(two_sources, staged, staged_on_two, tmp_path):
    train(two_sources, tmp_path, *STAGED, processes=2, kill=KILL)
    out = train(two_sources, tmp_path, *STAGED, processes=2)
    assert "resume  from step 6" in out
    assert result(tmp_path) == staged_on_two
    assert staged_on_two == staged


@pytest.mark.slow  # it starts six processes
def test_an_accepted_change_on_two_processes(two_sources, tmp_path):
    """It equals the run whose config has the change as a stage."""
    was = ("--config.train.steps=10", "--config.train.global_batch=8")
    now = ("--config.train.global_batch=16", "--config.optim.peak_lr=1e-3")
    accept = "--accept_changes=train.global_batch,optim.peak_lr"
    train(two_sources, tmp_path / "run", *was, processes=2, kill=KILL)
    out = train(two_sources, tmp_path / "run", *was, *now, accept, processes=2)
    assert "changed from step 7 on: " in out
    changes = {"train.global_batch": [8, 16], "optim.peak_lr": [2e-3, 1e-3]}
    assert changes_of(tmp_path / "run") == [{"step": 6, "changes": changes}]
    stages = "--config.train.stages=until 6: train.global_batch=8 optim.peak_lr=2e-3"
    train(two_sources, tmp_path / "twin", *was, *now, stages, processes=2)
    assert result(tmp_path / "run") == result(tmp_path / "twin")


@pytest.mark.slow  # it starts six processes
def test_a_branch_on_two_processes(two_sources, tmp_path):
    """A trunk with a constant rate and a cooldown equal one run with the schedule `wsd`."""
    wsd = ("--config.optim.schedule=wsd", "--config.optim.decay_steps=4")
    steps = "--config.train.steps=10"
    constant = ("--config.optim.schedule=constant", "--config.train.steps=100")
    train(two_sources, tmp_path / "trunk", *constant, processes=2, kill=(7, 6))
    place = tmp_path / "trunk" / "checkpoints" / "6"
    branch = f"--config.branch_from={place}"
    out = train(two_sources, tmp_path / "branch", *wsd, steps, branch, processes=2)
    assert f"branch  from step {place}" in out
    (change,) = changes_of(tmp_path / "branch")
    assert (change["step"], change["branch_from"]) == (6, str(place))
    train(two_sources, tmp_path / "one", *wsd, steps, processes=2)
    lost, state = result(tmp_path / "one")
    trunk, _ = result(tmp_path / "trunk")
    assert trunk == {step: lost[step] for step in range(1, 7)}
    assert result(tmp_path / "branch") == ({step: lost[step] for step in range(7, 11)}, state)
