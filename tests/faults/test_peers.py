"""An error or a signal in one process ends all of them at once; other waits have no limit."""

import os
import pathlib
import re
import signal

import pytest

from llama_jax.checkpoint.saved_step import load_meta
from tests.faults.test_stopping import ENDLESS, LONG_EVALUATION, end_all, start_slow
from tests.helpers import free_port, outputs_of, read_until, records, start, start_train

FULL = "[Errno 28] No space left on device"
MESSAGES = {"UserError": "made to fail, on two lines", "OSError": FULL, "KeyError": "KeyError: 'a"}
NO_EVAL = "--config.train.eval_every=100000"
TINY_RUN = (NO_EVAL, "--config.model.n_layers=1", "--config.train.steps=8")


def agree(mode, processes):
    return start("tests.faults.agreeing_child", processes=processes, devices=1, AGREE_MODE=mode)


def ends_of(group):
    """Returns exit status, stdout and the lines of stderr of each process."""
    return [(status, out, errors.splitlines()) for status, out, errors in end_all(group)]


def test_they_agree_on_texts_and_leave_no_keys_behind():
    ends = ends_of(agree("texts", 3))
    assert [(status, errors) for status, _, errors in ends] == [(0, [])] * 3
    # No more keys than one exchange needs are left, after 120 exchanges.
    assert int(re.search(r"^keys (\d+)$", ends[0][1], re.M)[1]) <= 6


def test_an_error_interrupts_who_works_and_who_waits():
    ends = ends_of(agree("fails", 3))
    assert [status for status, _, _ in ends] == [1] * 3
    assert [errors for _, _, errors in ends] == [
        ["error: process 2: the disk is on fire"],
        ["error: process 2: the disk is on fire"],
        ["error: the disk is on fire"],
    ]


def test_who_cannot_be_interrupted_ends_as_well():
    (_, _, first), *others = ends_of(agree("stuck", 3))
    # A bug has a traceback in the process where it occurs.
    assert first[-1] == "KeyError: 'a bug'" and first[0].startswith("Traceback")
    line = "error: process 0: KeyError: 'a bug'"
    assert [(status, errors) for status, _, errors in others] == [(1, [line])] * 2


def test_a_run_ends_well_on_all_or_on_none():
    ends = ends_of(agree("ends_late", 2))
    assert [(status, errors) for status, _, errors in ends] == [
        (1, [f"error: {FULL}"]),
        (1, [f"error: process 0: {FULL}"]),
    ]


@pytest.mark.parametrize(
    ("number", "victims"),
    [
        *((signal.SIGTERM, [1]), (signal.SIGINT, [0]), (signal.SIGTERM, [0, 1, 2])),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in ((signal.SIGINT, [1]), (signal.SIGTERM, [0]), (signal.SIGINT, [0, 1, 2]))
        ),
    ],
    ids=str,
)
def test_a_signal_to_any_ends_all(number, victims):
    """All processes may also get it at the same time, as from a scheduler."""
    group = agree("waits", 3)
    for process in group:
        read_until(process, "waits")
    for victim in victims:
        group[victim].send_signal(number)
    for status, out, errors in ends_of(group):
        assert status == 130 and errors == ["", "interrupted"] and "through" not in out


# Runs.


def run_failing(corpus, workdir, stage, process, error):
    where = {"FAIL_STAGE": stage, "FAIL_PROCESS": str(process), "FAIL_WITH": error}
    module = "tests.faults.failing_train"
    return start_train(corpus, workdir, *TINY_RUN, module=module, processes=2, devices=1, **where)


STAGES = [
    ("step", 1, "UserError"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("data", 0, "OSError"),
            ("data", 1, "UserError"),
            ("lock", 0, "OSError"),
            ("workdir", 0, "KeyError"),
            ("init", 1, "UserError"),
            ("data", 0, "KeyError"),
            ("open", 0, "OSError"),
            ("open", 1, "KeyError"),
            ("first_state", 0, "UserError"),
            ("first_state", 1, "OSError"),
            ("batch", 0, "OSError"),
            ("batch", 1, "KeyError"),
            ("step", 0, "OSError"),
        )
    ),
]


@pytest.mark.parametrize(("stage", "process", "error"), STAGES)
def test_what_fails_on_one_is_told_by_both(corpus, tmp_path, stage, process, error):
    ends = ends_of(run_failing(corpus, tmp_path / "run", stage, process, error))
    assert [status for status, _, _ in ends] == [1, 1], ends
    (other,) = ends[1 - process][2]
    assert other.startswith(f"error: process {process}: {MESSAGES[error]}")
    if error == "KeyError":
        assert ends[process][2][-1] == "KeyError: 'a bug'"
    else:
        assert ends[process][2] == [f"error: {MESSAGES[error]}"]


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory):
    """Returns the work directory of a run of two processes that was stopped."""
    run = tmp_path_factory.mktemp("two") / "run"
    group = start_train(corpus, run, *TINY_RUN, processes=2, devices=1)
    read_until(group[0], "step +2/")
    group[0].send_signal(signal.SIGTERM)
    assert [status for status, _, _ in end_all(group)] == [0, 0]
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "error", "message"),
    [
        ("meta", "UserError", "made to fail, on two lines"),
        ("restore", "OSError", FULL),
        ("item", "UserError", "made to fail, on two lines"),
        ("item", "damage", "made to be damaged"),
    ],
)
def test_what_one_cannot_restore_is_told_by_both(corpus, stopped, tmp_path, stage, error, message):
    os.rename(stopped, tmp_path / "run")
    try:
        ends = ends_of(run_failing(corpus, tmp_path / "run", stage, 1, error))
    finally:
        os.rename(tmp_path / "run", stopped)
    assert [status for status, _, _ in ends] == [1, 1], ends
    for _, _, errors in ends:
        assert len(errors) == 1 and message in errors[0]


def pair_of(*processes):
    """Starts two processes, each with its own (corpus, workdir, flags)."""
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    return [
        process
        for number, (corpus, workdir, flags) in enumerate(processes)
        for process in start_train(
            corpus, workdir, *flags, devices=1, **job, JAX_PROCESS_ID=str(number)
        )
    ]


def only_errors(group):
    ends = ends_of(group)
    assert [status for status, _, _ in ends] == [1, 1], ends
    return [line for _, _, (line,) in ends]


def test_an_empty_source(tmp_path):
    (tmp_path / "nothing").mkdir()
    flags = ("--config.train.steps=4",)
    group = start_train(tmp_path / "nothing", tmp_path / "run", *flags, processes=2, devices=1)
    first, second = only_errors(group)
    assert str(tmp_path / "nothing") in first
    assert second == first.replace("error: ", "error: process 0: ", 1)


def test_different_data_on_two_hosts(corpus, shards, tmp_path):
    from llama_jax.data.prepare.job import prepare
    from tests.helpers import text_config

    other = text_config(corpus, data__validation_fraction=0.4)
    prepare(other, tmp_path / "other", log=lambda line: None)
    flags = ("--config.train.steps=4", "--config.data.shard_tokens=1000")
    group = pair_of(
        (corpus, tmp_path / "run", (*flags, f"--config.data.path={shards}")),
        (corpus, tmp_path / "run", (*flags, f"--config.data.path={tmp_path / 'other'}")),
    )
    first, second = only_errors(group)
    assert second.startswith("error: the processes of this job have different data: ")
    assert first == second.replace("error: ", "error: process 1: ", 1)


def test_different_configs_on_two_hosts(corpus, tmp_path):
    group = pair_of(
        (corpus, tmp_path / "run", ("--config.train.steps=4",)),
        (corpus, tmp_path / "run", ("--config.train.steps=5",)),
    )
    first, second = only_errors(group)
    assert "train.steps is 4 on process 0 and 5 on process 1" in second
    assert first == second.replace("error: ", "error: process 1: ", 1)


def test_a_work_directory_that_is_not_shared(corpus, tmp_path):
    flags = ("--config.train.steps=4",)
    group = pair_of((corpus, tmp_path / "a", flags), (corpus, tmp_path / "b", flags))
    first, second = only_errors(group)
    assert f"{tmp_path / 'b' / 'data'}, which does not exist on process 1" in second
    assert first == second.replace("error: ", "error: process 1: ", 1)


@pytest.mark.parametrize(
    ("number", "victim"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_process_0_prepares(corpus, tmp_path, number, victim):
    pair = start_slow("data", 3600, corpus, tmp_path / "run", NO_EVAL, processes=2)
    read_until(pair[0], "phase data")
    pair[victim].send_signal(number)
    ends = ends_of(pair)
    assert [(status, errors) for status, _, errors in ends] == [(0, []), (0, [])]
    assert f"{number.name}: stopped, nothing to save" in ends[0][1]


# Longer than the shortest default time-out: a collective between CPUs gives up after 30 s.
LONG_S = 35


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["data", "restore"])
def test_a_stage_that_takes_longer_than_every_time_out(corpus, stopped, tmp_path, phase):
    """Process 0 prepares data for this long, or process 1 alone is slow to restore."""
    run, slow = tmp_path / "run", {"SLOW_PROCESS": "0"}
    if phase == "restore":
        os.rename(stopped, run)
        slow = {"SLOW_PROCESS": "1"}
    flags = (*TINY_RUN, "--config.train.checkpoint_every=4")
    group = start_slow(phase, LONG_S, corpus, run, *flags, processes=2, **slow)
    ends = ends_of(group)
    assert [(status, errors) for status, _, errors in ends] == [(0, []), (0, [])]
    assert "finished at step 8" in ends[0][1]
    assert {line["step"] for line in records(run) if "loss" in line} == {2, 4, 6, 8}
    if phase == "restore":
        os.rename(run, stopped)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_while_process_0_prepares(corpus, tmp_path, victim):
    """JAX ends the others: at once without process 0, otherwise when heartbeats are missing."""
    pair = start_slow("data", 3600, corpus, tmp_path / "run", NO_EVAL, processes=2)
    read_until(pair[0], "phase data")
    pair[victim].kill()
    (_, errors), (_, other) = outputs_of(pair)
    assert "another task died" in (other if victim == 0 else errors)
    assert pair[1 - victim].returncode not in (0, -signal.SIGKILL)
    assert not pathlib.Path(tmp_path / "run" / "data").exists()


@pytest.mark.slow
def test_two_processes_make_up_for_an_evaluation(corpus, tmp_path):
    run = tmp_path / "run"
    # Each batch is slow, because JAX needs up to seconds to pass the signal on.
    pair = start_slow("evaluate", 0.05, corpus, run, *LONG_EVALUATION, processes=2)
    read_until(pair[0], "phase evaluate")
    pair[1].send_signal(signal.SIGTERM)
    assert [status for status, _, _ in end_all(pair)] == [0, 0]
    saved = load_meta(run / "checkpoints" / "2")
    assert saved.eval_loss is None and not evaluated(run)
    for _ in range(2):
        again = (*ENDLESS, *LONG_EVALUATION, "--config.model.n_layers=1")
        again += ("--config.train.eval_batches=3",)
        pair = start_train(corpus, run, *again, processes=2, devices=1)
        read_until(pair[0], "step +[0-9]+/")
        pair[0].send_signal(signal.SIGTERM)
        ends = ends_of(pair)
        assert [(status, errors) for status, _, errors in ends] == [(0, []), (0, [])]
        assert [line["step"] for line in evaluated(run)].count(2) == 1
    assert evaluated(run)[0]["step"] == 2


def evaluated(run):
    return [line for line in records(run) if "eval_loss" in line]
