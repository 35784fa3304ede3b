"""In made-up environments, a process joins its job and takes the right GPUs."""

import os
import subprocess
import sys

import jax
import pytest

from llama_jax.errors import UserError
from llama_jax.parallel import cluster
from tests.helpers import ROOT, free_port, outputs_of, without_gloo

PLAIN = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[01-04]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "455344128.0;tcp://10.0.0.1:46267",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}
SLICES = {
    **GKE,
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "job-slice-0-0.job:8080",
}
TPU_VM = {"TPU_ML_PLATFORM": "JAX"}


@pytest.fixture
def start(monkeypatch):
    """Returns a function that runs `join_job`, and returns its result and the arguments of JAX."""

    def run(env, machine_gpus=0, **kwargs):
        calls = []
        monkeypatch.setattr(os, "environ", dict(env))
        monkeypatch.setattr(cluster, "_machine_gpus", lambda: machine_gpus)
        monkeypatch.setattr(
            jax.distributed, "initialize", lambda **arguments: calls.append(arguments)
        )
        means = cluster.join_job(**kwargs)
        assert len(calls) <= 1
        return means, calls[0] if calls else None

    return run


@pytest.mark.parametrize(
    ("env", "means", "arguments"),
    [
        (
            PLAIN,
            "environment",
            {
                "coordinator_address": "10.0.0.1:1234",
                "num_processes": 4,
                "process_id": 3,
                "cluster_detection_method": "deactivate",
            },
        ),
        (
            SLURM,
            "Slurm",
            {
                "num_processes": 4,
                "process_id": 2,
                "local_device_ids": [],
                "cluster_detection_method": "slurm",
            },
        ),
        (
            OPEN_MPI,
            "Open MPI",
            {
                "num_processes": 4,
                "process_id": 3,
                "local_device_ids": None,
                "cluster_detection_method": "ompi",
            },
        ),
        (GKE, "GKE", {"cluster_detection_method": "gketpu"}),
        (SLICES, "GKE", {"cluster_detection_method": "gketpu"}),
        (TPU_VM, "TPU metadata", {"cluster_detection_method": "gcetpu"}),
        # The order of precedence: the user's own variables, then mpirun, which itself may run on
        # Slurm.
        ({**SLURM, **PLAIN}, "environment", None),
        ({**SLURM, **OPEN_MPI}, "Open MPI", None),
        ({**TPU_VM, **GKE}, "GKE", None),
    ],
)
def test_each_kind_of_cluster(start, env, means, arguments):
    found, called = start(env, timeout_s=7)
    assert found == means
    # Later than our own time-out, whose message is one line.
    assert called.pop("initialization_timeout") == 67
    assert called.pop("heartbeat_timeout_seconds") <= 30  # JAX's default is 100
    assert arguments is None or called == arguments


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"HOME": "/root", "JAX_PLATFORMS": "cpu"},
        {"JAX_NUM_PROCESSES": "1"},
        {**PLAIN, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        # The shell of an interactive job of four tasks is a step of one task.
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        # A batch script, without srun.
        {name: value for name, value in SLURM.items() if "STEP" not in name},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {**TPU_VM, "TPU_SKIP_MDS_QUERY": "1"},
        {**TPU_VM, "JAX_PLATFORMS": "cpu"},
        {**TPU_VM, "JAX_NUM_PROCESSES": "1"},
    ],
)
def test_a_single_process_never_waits(start, env):
    assert start(env) == ("", None)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "JAX_NUM_PROCESSES is ''"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is ''"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES is ''"),
        ({**PLAIN, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES is 'four', not a number"),
        (
            {**PLAIN, "JAX_PROCESS_ID": "4"},
            "JAX_PROCESS_ID is 4, but there are 4 processes: 0 to 3",
        ),
        ({**PLAIN, "JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1', not a number"),
        ({**PLAIN, "JAX_COORDINATOR_ADDRESS": "node1"}, "'node1', which is not HOST:PORT"),
        ({**SLURM, "SLURM_PROCID": "9"}, "SLURM_PROCID is 9, but there are 4"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "x"}, "SLURM_STEP_TASKS_PER_NODE is 'x'"),
        ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": ""}, "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID is ''"),
        ({**SLICES, "MEGASCALE_SLICE_ID": ""}, "MEGASCALE_SLICE_ID is ''"),
        ({**SLICES, "MEGASCALE_SLICE_ID": "2"}, "MEGASCALE_SLICE_ID is 2, but there are 2"),
        ({**SLICES, "MEGASCALE_COORDINATOR_ADDRESS": ""}, "COORDINATOR_ADDRESS is not"),
    ],
)
def test_half_a_description_is_an_error(start, env, message):
    with pytest.raises(UserError) as error:
        start(env)
    assert message in str(error.value)


def test_an_address_of_ones_own_within_a_cluster(start):
    env = {**SLURM, "JAX_COORDINATOR_ADDRESS": "node09:99"}  # JAX reads this variable
    assert start(env)[0] == "Slurm"
    assert cluster.find_job(env).process_zero == "node09:99"
    without = {**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "", "JAX_COORDINATOR_ADDRESS": "node09:99"}
    assert start(without)[1]["cluster_detection_method"] == "deactivate"


EIGHT = ",".join("01234567")


@pytest.mark.parametrize(
    ("tasks", "index", "more", "gpus", "devices"),
    [
        # One task per node takes all GPUs, whether visible or not; JAX alone would take one.
        ("1(x4)", 0, {}, 8, []),
        ("1(x4)", 0, {"CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_GPUS_ON_NODE": "8"}, 8, []),
        # One task per GPU, all GPUs visible to all tasks: each takes one.
        ("8(x4)", 5, {}, 8, [5]),
        ("8(x4)", 5, {"CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_GPUS_ON_NODE": "8"}, 8, [5]),
        ("2(x4)", 1, {}, 8, [4, 5, 6, 7]),
        # Slurm (--gpus-per-task) or a wrapper has divided the GPUs: a task takes the visible ones.
        ("8(x4)", 5, {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "8"}, 8, []),
        ("2(x4)", 1, {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "SLURM_GPUS_ON_NODE": "8"}, 8, []),
        ("2(x4)", 1, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 8, []),
        # A job with half of the node's GPUs, all of them visible to both of its tasks.
        ("2(x4)", 1, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, 8, [2, 3]),
        # Without an NVIDIA GPU, the choice is left to JAX.
        ("2(x4)", 1, {}, 0, None),
        ("2(x4)", 1, {"CUDA_VISIBLE_DEVICES": "-1"}, 8, None),
        # The user's own variable, which JAX reads.
        ("1(x4)", 0, {"JAX_LOCAL_DEVICE_IDS": "3"}, 8, None),
        # The third node has one task.
        ("2(x2),1", 0, {}, 8, []),
    ],
)
def test_gpus_of_a_slurm_task(start, tasks, index, more, gpus, devices):
    env = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": str(index), **more}
    assert start(env, gpus)[1]["local_device_ids"] == devices


def test_gpus_of_an_open_mpi_process(start):
    assert start(OPEN_MPI, 8)[1]["local_device_ids"] == [4, 5, 6, 7]
    alone = {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert start({**OPEN_MPI, **alone}, 8)[1]["local_device_ids"] == []


def test_gpus_that_do_not_divide(start):
    with pytest.raises(UserError, match="8 GPUs do not divide over the 3 tasks of this host"):
        start({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3(x4)"}, 8)


def test_what_jax_says_is_told_in_a_line(start, monkeypatch):
    start({})

    def fail(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(os, "environ", TPU_VM)
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(
        UserError, match=r"found by TPU metadata .*should be defined\.; JAX_NUM_PRO"
    ):
        cluster.join_job()


# The following tests use the real JAX, in processes of their own.
CODE = """
import sys, jax
from llama_jax.parallel.cluster import join_job
means = join_job(int(sys.argv[1]))
visible = jax.config.values["jax_cuda_visible_devices"]
print(means, jax.process_index(), jax.process_count(), jax.device_count(), visible, flush=True)
jax.distributed.shutdown()
"""


def launch(timeout_s, env):
    base = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(timeout_s)],
        cwd=ROOT,
        env={**base, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("kind", ["Slurm", "Open MPI", "environment"])
def test_two_processes_meet_and_all_devices_are_used(kind):
    port = free_port()
    shared = {
        "Slurm": {
            **SLURM,
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_TASKS": "2",
            "JAX_COORDINATOR_PORT": port,
        },
        "Open MPI": {
            **OPEN_MPI,
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "OMPI_MCA_orte_hnp_uri": "455344128.0;tcp://127.0.0.1:46267",
            "JAX_COORDINATOR_PORT": port,
        },
        "environment": {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"},
    }[kind]
    index = {
        "Slurm": "SLURM_PROCID",
        "Open MPI": "OMPI_COMM_WORLD_RANK",
        "environment": "JAX_PROCESS_ID",
    }[kind]
    pair = [launch(120, {**shared, index: str(number)}) for number in range(2)]
    for number, (output, errors) in enumerate(outputs_of(pair)):
        assert without_gloo(output) == [f"{kind} {number} 2 4 all"], errors


def test_torn_lines_of_gloo_are_told_from_ours():
    rest = "peer ranks. Expected number of connected peer ranks is : 7"
    torn = f"[Gloo] Rank [Gloo] Rank 12 is connected to  is connected to 77 {rest}\n {rest}\n"
    assert without_gloo(f"{torn}\nstep 2/8\n[Gloo] Rank 3 is connected to 7 {rest}\n") == [
        "step 2/8"
    ]


def test_processes_that_do_not_meet_say_so_in_one_line():
    here = f"localhost:{free_port()}"
    env = {"JAX_COORDINATOR_ADDRESS": here, "JAX_NUM_PROCESSES": "2"}
    there = {**env, "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}"}
    started = {
        here: launch(1, {**env, "JAX_PROCESS_ID": "0"}),  # waits for process 1
        there["JAX_COORDINATOR_ADDRESS"]: launch(1, {**there, "JAX_PROCESS_ID": "1"}),
        "the first of the nodes node[01-04]": launch(1, SLURM),
    }
    outputs = outputs_of(list(started.values()))
    for (place, process), (output, errors) in zip(started.items(), outputs, strict=True):
        assert process.returncode == 1 and output == "", errors
        assert errors.startswith("error: the ") and len(errors.splitlines()) == 1, errors
        assert place in errors and "within 1 s" in errors
