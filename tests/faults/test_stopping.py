"""SIGTERM and SIGINT save and exit with 0 in every phase; a hung or dead process ends the run."""

import os
import pathlib
import re
import signal
import time

import pytest

from tests.helpers import outputs_of, read_until, start_train

ENDLESS = ("--config.train.steps=100000", "--config.train.checkpoint_every=100000")
NO_EVAL = "--config.train.eval_every=100000"
TINY_RUN = (NO_EVAL, "--config.model.n_layers=1")
# When this evaluation is slowed down, it takes longer than any test waits.
LONG_EVALUATION = (
    *("--config.train.eval_every=2", "--config.train.eval_batches=100000"),
    *("--config.data.validation_fraction=0.98", "--config.train.seq_len=4"),
    *("--config.train.loss_chunk=4", "--config.train.global_batch=2"),
)


def end_all(processes):
    began = time.monotonic()
    outputs = outputs_of(processes)
    print(f"it took {time.monotonic() - began:.1f} s to end", *(errors for _, errors in outputs))
    return [
        (process.returncode, *output) for process, output in zip(processes, outputs, strict=True)
    ]


def end(process):
    return end_all([process])[0]


def stopped_at(out):
    return int(re.search(r"stopped at step (\d+), saved", out)[1])


def start_slow(phase, seconds, corpus, workdir, *flags, **options):
    """Starts a run in which one phase takes this many seconds, or until `go_on(workdir)`."""
    slow = {"SLOW_PHASE": phase, "SLOW_SECONDS": str(seconds), "SLOW_UNTIL": f"{workdir}.go"}
    options = {"devices": 1, "module": "tests.faults.slow_train", **slow, **options}
    return start_train(corpus, workdir, *ENDLESS, "--config.model.n_layers=1", *flags, **options)


def go_on(workdir):
    pathlib.Path(f"{workdir}.go").touch()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_the_first_step(corpus, tmp_path, number):
    (process,) = start_slow("data", 3600, corpus, tmp_path / "run", NO_EVAL, devices=8)
    read_until(process, "phase data")
    process.send_signal(number)
    status, out, errors = end(process)
    assert status == 0 and errors == ""
    assert f"{number.name}: stopped, nothing to save" in out


def test_while_it_compiles(corpus, tmp_path):
    (process,) = start_slow("compile", 0, corpus, tmp_path / "run", NO_EVAL)
    read_until(process, "phase compile")
    process.send_signal(signal.SIGTERM)
    status, out, errors = end(process)
    assert status == 0 and errors == ""
    if "stopped before the first step" not in out:
        assert (tmp_path / "run" / "checkpoints" / str(stopped_at(out))).exists()


def test_while_it_evaluates(corpus, tmp_path):
    """A long evaluation is interrupted, because saving comes first."""
    (process,) = start_slow("evaluate", 0.05, corpus, tmp_path / "run", *LONG_EVALUATION)
    read_until(process, "phase evaluate")
    process.send_signal(signal.SIGTERM)
    status, out, errors = end(process)
    assert status == 0 and errors == ""
    assert "eval_loss" not in out
    assert stopped_at(out) == 2
    assert (tmp_path / "run" / "checkpoints" / "2").exists()


def test_in_the_last_evaluation(corpus, tmp_path):
    """The run is not finished, and its exit status tells a launcher to start it again."""
    flags = (*LONG_EVALUATION, NO_EVAL, "--config.train.steps=4")
    flags += ("--config.train.sample_prompt=a", "--stopped_status=75")
    (process,) = start_slow("evaluate", 0.05, corpus, tmp_path / "run", *flags)
    read_until(process, "phase evaluate")
    process.send_signal(signal.SIGTERM)
    status, out, errors = end(process)
    assert status == 75 and errors == ""
    assert stopped_at(out) == 4 and "eval_loss" not in out and "what it writes" not in out


def test_while_it_saves(corpus, tmp_path):
    flags = ("--config.train.steps=100000", "--config.train.checkpoint_every=1", NO_EVAL)
    (process,) = start_train(corpus, tmp_path / "run", *flags, devices=1)
    read_until(process, "step +4/")
    process.send_signal(signal.SIGINT)
    status, out, errors = end(process)
    assert status == 0 and errors == ""
    newest = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert newest == stopped_at(out)


def one_checkpoint(workdir, out):
    """Returns whether the run saved the step that it reports as its last, and no other one."""
    (path,) = (workdir / "checkpoints").iterdir()
    return path.name == str(stopped_at(out))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_it_restores(corpus, tmp_path, number):
    flags = (*TINY_RUN, "--config.train.checkpoint_every=100000")
    (first,) = start_train(corpus, tmp_path / "run", *flags, "--config.train.steps=100000")
    read_until(first, "step +2/")
    first.send_signal(signal.SIGTERM)
    saved = stopped_at(end(first)[1])
    (process,) = start_slow("restore", 3600, corpus, tmp_path / "run", NO_EVAL, devices=8)
    read_until(process, "phase restore")
    process.send_signal(number)
    go_on(tmp_path / "run")
    status, out, errors = end(process)
    assert status == 0 and errors == ""
    assert "stopped before the first step" in out
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(saved)]


SECOND = [
    ("save", signal.SIGTERM),
    ("evaluate", signal.SIGINT),
    pytest.param("save", signal.SIGINT, marks=pytest.mark.slow),
    pytest.param("evaluate", signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param("compile", signal.SIGTERM, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("phase", "number"), SECOND)
def test_a_second_signal_ends_it_at_once(corpus, tmp_path, phase, number):
    """Without the second signal, the run would wait for an hour."""
    flags = ("--config.train.eval_every=1",) if phase == "evaluate" else (NO_EVAL,)
    (process,) = start_slow(phase, 3600, corpus, tmp_path / "run", *flags)
    if phase == "save":  # only a signal makes it save
        read_until(process, "step +2/")
    else:
        read_until(process, f"phase {phase}")
    process.send_signal(number)
    read_until(process, f"{number.name}: saving after this step")
    if phase == "save":
        read_until(process, "phase save")
    assert process.poll() is None
    process.send_signal(number)
    assert end(process)[0] == -number


# Several processes.


def step_2_of(group):
    read_until(group[0], "step +2/")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_many_stops_all_at_the_same_step(corpus, tmp_path, number, processes):
    group = start_train(corpus, tmp_path / "run", *ENDLESS, NO_EVAL, processes=processes)
    step_2_of(group)
    group[-1].send_signal(number)
    ends = end_all(group)
    assert [status for status, _, _ in ends] == [0] * processes, ends
    assert one_checkpoint(tmp_path / "run", ends[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("phase", "seconds"), [("compile", 3600), ("evaluate", 0.05), ("save", 3600), ("restore", 3600)]
)
def test_one_of_two_in_every_phase(corpus, tmp_path, phase, seconds, victim):
    flags = list(LONG_EVALUATION) if phase == "evaluate" else [NO_EVAL]
    if phase == "save":
        flags += ["--config.train.checkpoint_every=2"]
    if phase == "restore":
        first = start_train(corpus, tmp_path / "run", *ENDLESS, *TINY_RUN, processes=2, devices=1)
        step_2_of(first)
        first[0].send_signal(signal.SIGTERM)
        saved = stopped_at(end_all(first)[0][1])
    pair = start_slow(phase, seconds, corpus, tmp_path / "run", *flags, processes=2)
    read_until(pair[0], f"phase {phase}")
    pair[victim].send_signal(signal.SIGTERM)
    if phase != "evaluate":
        go_on(tmp_path / "run")
    ends = end_all(pair)
    assert [status for status, _, _ in ends] == [0, 0], ends
    out = ends[0][1]
    if phase == "restore":
        assert "stopped before the first step" in out or stopped_at(out) > saved
    elif "stopped before the first step" not in out:
        assert (tmp_path / "run" / "checkpoints" / str(stopped_at(out))).exists()
    if phase == "evaluate":
        assert "eval_loss" not in out and stopped_at(out) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_process_0_of_two_before_the_first_step(corpus, tmp_path, number):
    pair = start_slow("data", 3600, corpus, tmp_path / "run", NO_EVAL, processes=2)
    read_until(pair[0], "phase data")
    pair[0].send_signal(number)
    ends = end_all(pair)
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert f"{number.name}: stopped, nothing to save" in ends[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_to_one_of_two_ends_it_at_once(corpus, tmp_path, number):
    """They have agreed on the step at which to stop; its save would take an hour."""
    pair = start_slow("save", 3600, corpus, tmp_path / "run", NO_EVAL, processes=2)
    step_2_of(pair)
    pair[0].send_signal(number)
    read_until(pair[0], "phase save")
    assert pair[0].poll() is None
    pair[0].send_signal(number)
    ends = end_all(pair)
    assert ends[0][0] == -number and ends[1][0] not in (0, -signal.SIGKILL), ends


def test_a_second_job_in_the_same_directory_refuses(corpus, tmp_path):
    (first,) = start_train(corpus, tmp_path / "run", *ENDLESS, NO_EVAL, devices=1)
    read_until(first, "step +2/")
    config = (tmp_path / "run" / "config.json").read_bytes()
    (second,) = start_train(corpus, tmp_path / "run", "--config.train.steps=7", devices=1)
    status, out, errors = end(second)
    assert status == 1 and out == ""
    assert errors.startswith("error: another process trains in ")
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    first.kill()  # the kernel then releases the lock of the directory
    first.communicate()
    (third,) = start_train(corpus, tmp_path / "run", *ENDLESS, NO_EVAL, devices=1)
    read_until(third, "step +2/")
    third.send_signal(signal.SIGTERM)
    assert end(third)[0] == 0


# Process 0 is the coordinator: its end is noticed at once, without heartbeats.
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other_in_bounded_time(tmp_path, victim):
    pair = start_train("synthetic", tmp_path / "run", *ENDLESS, *TINY_RUN, processes=2, devices=1)
    step_2_of(pair)
    pair[victim].kill()
    status, _, errors = end(pair[1 - victim])
    pair[victim].communicate()
    assert status not in (0, -signal.SIGKILL), errors
    assert "another task died" in errors  # a message of JAX
    # In a traceback or in the stacks of the threads: the process was waiting there.
    assert "in run_loop" in errors


# The hang is noticed before the missing heartbeats are.
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_hangs_is_noticed(tmp_path, victim):
    flags = (*ENDLESS, *TINY_RUN, "--config.train.step_timeout=5")
    pair = start_train("synthetic", tmp_path / "run", *flags, processes=2, devices=1)
    step_2_of(pair)
    os.kill(pair[victim].pid, signal.SIGSTOP)
    try:
        status, _, errors = end(pair[1 - victim])
    finally:
        pair[victim].kill()
        pair[victim].communicate()
    assert status not in (0, -signal.SIGKILL), errors
    assert "error: no sign of life in step" in errors and "for longer than 5 s" in errors
    assert "Thread 0x" in errors and "in run_loop" in errors  # the stacks


@pytest.mark.slow
def test_a_process_that_compiles_longer_than_the_other(corpus, tmp_path):
    """The other process waits for it, and the watchdog ends neither."""
    flags = (NO_EVAL, "--config.train.step_timeout=5", "--config.train.steps=4")
    slow = {"processes": 2, "SLOW_PROCESS": "1"}
    ends = end_all(start_slow("compile", 12, corpus, tmp_path / "run", *flags, **slow))
    assert [status for status, _, _ in ends] == [0, 0], ends


@pytest.mark.slow
def test_an_evaluation_longer_than_the_time_for_a_step(corpus, tmp_path):
    flags = ("--config.train.step_timeout=10", "--config.train.eval_every=3")
    flags += ("--config.train.eval_batches=9", "--config.train.steps=3")
    flags += ("--config.data.validation_fraction=0.9", "--config.train.global_batch=2")
    began = time.monotonic()
    (process,) = start_slow("evaluate", 1.5, corpus, tmp_path / "run", *flags)
    status, out, errors = end(process)
    assert (status, errors) == (0, "")
    assert out.count("eval_loss") == 1 and time.monotonic() - began > 13


@pytest.mark.slow
def test_a_restore_that_hangs_is_noticed(corpus, tmp_path):
    run = tmp_path / "run"
    (first,) = start_train(corpus, run, *ENDLESS, *TINY_RUN, devices=1)
    read_until(first, "step +2/")
    first.send_signal(signal.SIGTERM)
    saved = stopped_at(end(first)[1])
    # A restore has ten times as long, because it may compile.
    slow = "--config.train.step_timeout=1"
    (process,) = start_slow("restore", 3600, corpus, run, NO_EVAL, slow)
    status, _, errors = end(process)
    assert status == 1
    assert "error: no sign of life in restoring" in errors
    assert "in initial_state" in errors  # the stack
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(saved)]
