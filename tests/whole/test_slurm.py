"""launch/slurm.sbatch on a real Slurm that slurm_cluster.sh starts: two tasks, on CPUs."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.slurm
CLUSTER = str(ROOT / "tests" / "slurm_cluster.sh")
FLAGS = (
    *("--config=configs/tiny.py", "--config.data.source=synthetic"),
    *("--config.model.vocab_size=64", "--config.model.dim=32", "--config.model.n_heads=4"),
    *("--config.model.n_layers=2", "--config.model.ffn_dim=48", "--config.optim.warmup_steps=2"),
    *("--config.train.seq_len=16", "--config.train.global_batch=8", "--config.train.log_every=10"),
    *("--config.train.checkpoint_every=20", "--config.train.eval_every=1000000"),
)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Yields a function that runs a command of Slurm and returns its output."""
    if shutil.which("slurmctld") is None:
        pytest.fail("Slurm is not installed; `make slurm` does that")
    folder = tmp_path_factory.mktemp("slurm")
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"

    def run(*command):
        process = subprocess.run(
            list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
        )
        assert process.returncode == 0, (command, process.stdout, process.stderr)
        return process.stdout.strip()

    try:
        run(CLUSTER, "start", folder)
        yield run
    finally:
        subprocess.run([CLUSTER, "stop", str(folder)], env=env, check=True, timeout=600)


def submit(slurm, tmp_path, steps, *flags, restarts=10, python=sys.executable):
    """Queues a run; returns the id of the job and the path of its log."""
    log = tmp_path / "job.log"
    flags = [*FLAGS, f"--workdir={tmp_path / 'run'}", f"--config.train.steps={steps}", *flags]
    export = f"--export=ALL,PYTHON={python}"
    sbatch = ("sbatch", "--parsable", "--ntasks-per-node=2", export, f"--output={log}")
    script = ("launch/slurm.sbatch", f"--restarts={restarts}", "--backoff=1", "--")
    return slurm(*sbatch, *script, *flags), log


def wait_for(pattern, log, count=1, seconds=900):
    """Returns the matches of a pattern in the log, once there are at least `count`."""
    deadline = time.monotonic() + seconds
    while True:
        text = log.read_text() if log.exists() else ""
        found = re.findall(pattern, text)
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline, f"{pattern} is not in:\n{text}"
        time.sleep(0.5)


def wait_for_state(slurm, job, state, also="", seconds=900):
    """Waits until Slurm reports this state and the job has left its node."""
    deadline = time.monotonic() + seconds
    while True:
        text = slurm("scontrol", "show", "job", job)
        on_node = slurm("squeue", "--noheader", "--states=COMPLETING")
        if f"JobState={state} " in text and also in text and not on_node:
            return
        assert time.monotonic() < deadline, text
        time.sleep(0.5)


def python_that_ends_late(folder):
    """Writes an interpreter that ends 5 s late in task 0, like a busy machine; returns its path."""
    script = folder / "python"
    script.write_text(f"""#!/usr/bin/env bash
trap : TERM  # the interpreter gets it too, and saves
{sys.executable} "$@"
status=$?
trap - TERM
[[ $SLURM_PROCID != 0 ]] || sleep 5
exit $status
""")
    script.chmod(0o700)
    return script


def tasks_of(workdir):
    """Returns the ids of the training processes, which their command lines show."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue  # the process has ended
        if f"--workdir={workdir}" in words and words[1:3] == ["-m", "llama_jax.train"]:
            found.append(int(path.parent.name))
    return sorted(found)


def test_two_tasks_train_to_the_end(slurm, tmp_path):
    job, log = submit(slurm, tmp_path, 60)
    wait_for("finished at step 60", log)
    wait_for_state(slurm, job, "COMPLETED")
    assert "ExitCode=0:0" in slurm("scontrol", "show", "job", job)
    text = log.read_text()
    assert "0: start   2 processes, found by Slurm" in text
    assert "on 2 cpu device(s), 2 process(es)" in text
    assert (tmp_path / "run" / "checkpoints" / "60").exists()


def test_a_job_survives_a_killed_task_and_its_time_limit(slurm, tmp_path):
    job, log = submit(slurm, tmp_path, 1_000_000, python=python_that_ends_late(tmp_path))
    wait_for(r"step +40/", log)
    tasks = tasks_of(tmp_path / "run")
    assert len(tasks) == 2
    os.kill(tasks[1], signal.SIGKILL)
    wait_for(r"retry: exit status \d+; restart 1 of 10 in 1 s", log)
    (resumed,) = wait_for(r"resume  from step (\d+)", log)
    assert int(resumed) >= 20 and int(resumed) % 20 == 0
    wait_for(rf"(?s)resume .*step +{int(resumed) + 20}/", log)

    slurm("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    (stopped,) = wait_for(r"stopped at step (\d+), saved", log)
    wait_for(f"saved; queueing job {job} again", log)
    # Slurm would wait for two minutes, counted from when the job has left its node completely. A
    # new start within the same second would be taken for the old one ("already killed, do not
    # launch").
    wait_for_state(slurm, job, "PENDING", "Reason=BeginTime")
    slurm("scontrol", "update", f"jobid={job}", "StartTime=now+3")
    assert wait_for(r"resume  from step (\d+)", log, 2)[1] == stopped

    slurm("scancel", job)  # saves, and ends the job
    wait_for(r"stopped at step \d+, saved", log, 2)
    wait_for_state(slurm, job, "CANCELLED")
    assert "Restarts=1 " in slurm("scontrol", "show", "job", job)


def test_what_cannot_be_trained_is_not_tried_for_ever(slurm, tmp_path):
    job, log = submit(slurm, tmp_path, 60, "--config.mesh.fsdp=7", restarts=1)
    wait_for_state(slurm, job, "FAILED", seconds=900)
    text = log.read_text()
    assert "does not cover 2 devices" in text
    assert "retry: exit status 1; giving up after 1 restart(s)" in text
