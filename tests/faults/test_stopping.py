"""SIGTERM and SIGINT save and exit with 0 from every phase; what hangs or dies ends in time."""

import os
import re
import signal
import time

import pytest

from tests.helpers import start_train

ENDLESS = ("--config.train.steps=100000", "--config.train.checkpoint_every=100000")
NO_EVAL = "--config.train.eval_every=100000"


def read_until(process, pattern):
    """Reads the output up to the first line that matches."""
    for line in process.stdout:
        if re.match(pattern, line):
            return line
    raise AssertionError(f"ended without {pattern}: {process.stderr.read()}")


def end(process, timeout=90):
    try:
        out, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, errors


def stopped_at(out):
    return int(re.search(r"stopped at step (\d+), saved", out)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_the_first_step(corpus, tmp_path, number):
    (process,) = start_train(corpus, tmp_path / "run", *ENDLESS, NO_EVAL)
    read_until(process, "training a tokenizer")
    process.send_signal(number)
    status, out, errors = end(process)
    assert status == 0 and errors == ""
    assert f"{number.name}: stopped, nothing to save" in out


def test_while_it_compiles(corpus, tmp_path):
    (process,) = start_train(corpus, tmp_path / "run", *ENDLESS, NO_EVAL, devices=1)
    read_until(process, "mesh ")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    status, out, errors = end(process)
    assert status == 0 and errors == ""
    if "stopped before the first step" not in out:
        assert (tmp_path / "run" / "checkpoints" / str(stopped_at(out))).exists()


def test_while_it_evaluates(corpus, tmp_path):
    """A long evaluation is broken off: saving comes first."""
    flags = ("--config.train.eval_every=2", "--config.train.eval_batches=100000")
    flags += ("--config.data.validation_fraction=0.9", "--config.train.global_batch=1")
    (process,) = start_train(corpus, tmp_path / "run", *ENDLESS, *flags, devices=1)
    read_until(process, "step +2/")
    process.send_signal(signal.SIGTERM)
    status, out, errors = end(process)
    assert status == 0 and errors == ""
    assert "eval_loss" not in out
    assert stopped_at(out) == 2
    assert (tmp_path / "run" / "checkpoints" / "2").exists()


def test_while_it_saves(corpus, tmp_path):
    flags = ("--config.train.steps=100000", "--config.train.checkpoint_every=1", NO_EVAL)
    (process,) = start_train(corpus, tmp_path / "run", *flags, devices=1)
    read_until(process, "step +4/")
    process.send_signal(signal.SIGINT)
    status, out, errors = end(process)
    assert status == 0 and errors == ""
    newest = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert newest == stopped_at(out)


@pytest.mark.slow
def test_ctrl_c_on_one_of_two_stops_both_at_the_same_step(corpus, tmp_path):
    pair = start_train(corpus, tmp_path / "run", *ENDLESS, NO_EVAL, processes=2)
    read_until(pair[0], "step +2/")
    pair[1].send_signal(signal.SIGINT)
    ends = [end(process) for process in pair]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert (tmp_path / "run" / "checkpoints" / str(stopped_at(ends[0][1]))).exists()


def test_a_second_job_in_the_same_directory_refuses(corpus, tmp_path):
    (first,) = start_train(corpus, tmp_path / "run", *ENDLESS, NO_EVAL, devices=1)
    read_until(first, "step +2/")
    config = (tmp_path / "run" / "config.json").read_bytes()
    (second,) = start_train(corpus, tmp_path / "run", "--config.train.steps=7", devices=1)
    status, out, errors = end(second)
    assert status == 1 and out == ""
    assert errors.startswith("error: another process trains in ")
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    first.kill()  # and the kernel lets go of the directory
    first.communicate()
    (third,) = start_train(corpus, tmp_path / "run", *ENDLESS, NO_EVAL, devices=1)
    read_until(third, "step +2/")
    third.send_signal(signal.SIGTERM)
    assert end(third)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_in_bounded_time(corpus, tmp_path, victim):
    pair = start_train(corpus, tmp_path / "run", *ENDLESS, NO_EVAL, processes=2)
    read_until(pair[0], "step +2/")
    pair[victim].kill()
    began = time.monotonic()
    status, _, errors = end(pair[1 - victim])
    pair[victim].communicate()
    assert status not in (0, -signal.SIGKILL), errors
    assert time.monotonic() - began < 35
    assert "another task died" in errors  # JAX says so


@pytest.mark.slow
def test_a_process_that_hangs_is_noticed(corpus, tmp_path):
    flags = (*ENDLESS, NO_EVAL, "--config.train.step_timeout=10")
    pair = start_train(corpus, tmp_path / "run", *flags, processes=2)
    read_until(pair[0], "step +2/")
    os.kill(pair[1].pid, signal.SIGSTOP)
    try:
        status, _, errors = end(pair[0])
    finally:
        pair[1].kill()
        pair[1].communicate()
    assert status not in (0, -signal.SIGKILL), errors
    # Before the heartbeats that it misses are.
    assert "error: no sign of life in step" in errors and "for longer than 10 s" in errors
    assert "Thread 0x" in errors
