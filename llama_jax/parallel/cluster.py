"""Joins the processes of one job: which cluster is this, and which devices of the host are ours?

Only command modules import this one, before anything touches a device. A cluster is recognised by
its environment variables alone, so that a single process on a laptop never asks the network and
never waits. What JAX can find by itself (addresses, mostly) is left to it; what it gets wrong, or
says by aborting, is done here.
"""

import dataclasses
import glob
import os
import re
import sys
import threading
from collections.abc import Mapping
from typing import Any

import jax

from llama_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Seconds without a sign of life after which a process is taken for dead, and all others end.
HEARTBEAT_S = 25
# Seconds in which all of them have to be started.
MEETING_S = 300
# What Slurm sets for a task that `srun` started; a batch script alone has no SLURM_STEP_NODELIST.
_SLURM_TASK = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")

Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Job:
    """The job that this process belongs to, as its environment describes it.

    Attributes:
      means: how it was found, for people.
      processes: how many there are; None where only JAX can find out.
      process_zero: where process 0 is waited for, for people.
      arguments: of `jax.distributed.initialize`.
    """

    means: str
    processes: int | None
    process_zero: str
    arguments: dict[str, Any]


def join_job(timeout_s: int = MEETING_S) -> str:
    """Joins the other processes of the job, where the environment names any.

    Args:
      timeout_s: seconds to wait for them; then the process ends with one line and status 1. JAX
        itself would abort with a stack trace, past every `except`.

    Returns:
      How the job was found, such as "Slurm"; "" for a single process.

    Raises:
      UserError: the environment names the processes in part or wrongly, or they cannot be joined.
    """
    job = find_job(os.environ)
    if job is None or job.processes == 1:
        return ""
    watchdog = threading.Timer(timeout_s, _give_up, (job, timeout_s))
    watchdog.daemon = True
    watchdog.start()
    # It would take SIGTERM from here on, and only note it: `StopRequest` has it begin later.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **job.arguments,
            initialization_timeout=timeout_s + 60,
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(
            f"cannot join the processes of this job, found by {job.means} "
            f"({job.process_zero}): {error}; {COUNT}=1 starts a single process"
        ) from error
    finally:
        watchdog.cancel()
    return job.means


def _give_up(job: Job, timeout_s: int) -> None:
    """Ends the process: the thread that waits in JAX cannot be interrupted."""
    total = f"{job.processes} " if job.processes else ""
    print(
        f"error: the {total}processes of this job, found by {job.means}, did not all meet at "
        f"process 0 ({job.process_zero}) within {timeout_s} s; do all of them run, and can they "
        f"reach that address? {ADDRESS}=HOST:PORT names another",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def find_job(env: Environment) -> Job | None:
    """The job that the variables describe; None where they describe none.

    JAX_COORDINATOR_ADDRESS alone, in a cluster, replaces the address that is found there.

    Raises:
      UserError: they describe it in part, or with numbers that cannot be.
    """
    if COUNT in env or INDEX in env:
        return _plain(env)
    for cluster in (_open_mpi, _slurm, _tpu_pods):  # mpirun on Slurm is Open MPI's
        job = cluster(env)
        if job is not None:
            return job
    return _plain(env) if ADDRESS in env else _tpu_vm(env)


def _plain(env: Environment) -> Job:
    """Three variables of ours to set; all GPUs of the host, or those of JAX_LOCAL_DEVICE_IDS."""
    count = _number(env, COUNT)
    if count == 1 and ADDRESS not in env and INDEX not in env:
        return Job("environment", 1, "here", {})
    index = _number(env, INDEX)
    address = env.get(ADDRESS, "")
    if not re.fullmatch(r"\S+:\d+", address):
        raise UserError(f"{ADDRESS} is {address!r}, which is no HOST:PORT")
    _check_index(INDEX, index, count)
    arguments = {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        # Else JAX would still look for a cluster, and take from Slurm which one GPU is ours.
        "cluster_detection_method": "deactivate",
    }
    return Job("environment", count, address, arguments)


def _open_mpi(env: Environment) -> Job | None:
    """A process that `mpirun` started."""
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    count, index = _number(env, "OMPI_COMM_WORLD_SIZE"), _number(env, "OMPI_COMM_WORLD_RANK")
    _check_index("OMPI_COMM_WORLD_RANK", index, count)
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    if count > 1 and not uri and ADDRESS not in env:
        raise UserError(
            "this version of Open MPI does not say where process 0 is: "
            f"mpirun -x {ADDRESS}=HOST:PORT (of the first host) does"
        )
    local = (_number(env, "OMPI_COMM_WORLD_LOCAL_SIZE"), _number(env, "OMPI_COMM_WORLD_LOCAL_RANK"))
    arguments = {
        "num_processes": count,
        "process_id": index,
        "local_device_ids": _own_devices(env, *local, _machine_gpus()),
        # Newer JAX asks mpi4py where there is no URI, even for what it is told here.
        "cluster_detection_method": "ompi" if uri else "deactivate",
    }
    return Job("Open MPI", count, env.get(ADDRESS, f"the host of mpirun, {uri}"), arguments)


def _slurm(env: Environment) -> Job | None:
    """A task that `srun` started.

    The tasks of the step are counted, not those of the job (SLURM_NTASKS), as JAX does: in the
    shell of an interactive job, which is a step of one task, it would wait for ever.
    """
    if not all(name in env for name in _SLURM_TASK):
        return None
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    count, index = _number(env, name), _number(env, "SLURM_PROCID")
    _check_index("SLURM_PROCID", index, count)
    tasks = _tasks_on_node(env)
    if "SLURM_GPUS_ON_NODE" in env:
        gpus_on_node = _number(env, "SLURM_GPUS_ON_NODE")
    else:
        gpus_on_node = _machine_gpus()
    arguments = {
        "num_processes": count,
        "process_id": index,
        "local_device_ids": _own_devices(env, tasks, _number(env, "SLURM_LOCALID"), gpus_on_node),
        "cluster_detection_method": "slurm",
    }
    first = f"the first of the nodes {env['SLURM_STEP_NODELIST']}"
    return Job("Slurm", count, env.get(ADDRESS, first), arguments)


def _tasks_on_node(env: Environment) -> int:
    """Tasks of the step on this node; Slurm lists them as `2(x3),1`."""
    listed = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "1"
    tasks: list[int] = []
    for part in listed.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {listed!r}, not like '2(x3),1'")
        tasks += [int(found[1])] * int(found[2] or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return tasks[node] if node < len(tasks) else tasks[-1]


def _tpu_pods(env: Environment) -> Job | None:
    """A worker of a TPU slice, or of several slices, in GKE, which sets these variables."""
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if not hosts:
        return None
    workers = len(hosts.split(","))
    slices = _number(env, "MEGASCALE_NUM_SLICES") if env.get("MEGASCALE_NUM_SLICES") else 1
    if workers * slices == 1:
        return Job("GKE", 1, "here", {})
    _check_index("TPU_WORKER_ID", _number(env, "TPU_WORKER_ID"), workers)
    address = hosts.split(",")[0]
    if slices > 1:
        # Without these, JAX would take every slice for the first one.
        _check_index("MEGASCALE_SLICE_ID", _number(env, "MEGASCALE_SLICE_ID"), slices)
        address = env.get("MEGASCALE_COORDINATOR_ADDRESS", "")
        if not address:
            raise UserError("MEGASCALE_NUM_SLICES is set, but no MEGASCALE_COORDINATOR_ADDRESS")
    arguments = {"cluster_detection_method": "gketpu"}
    return Job("GKE", workers * slices, env.get(ADDRESS, address), arguments)


def _tpu_vm(env: Environment) -> Job | None:
    """A Cloud TPU VM, whose metadata server knows the other hosts.

    At its import JAX sets TPU_ML_PLATFORM where it finds chips and their library, and
    TPU_SKIP_MDS_QUERY where it finds no chips.
    """
    platforms = env.get("JAX_PLATFORMS", "")
    if "TPU_ML_PLATFORM" not in env or "TPU_SKIP_MDS_QUERY" in env:
        return None
    if platforms and "tpu" not in platforms:
        return None
    first = env.get(ADDRESS, "the first worker of the slice")
    return Job("TPU metadata", None, first, {"cluster_detection_method": "gcetpu"})


def _own_devices(env: Environment, tasks: int, index: int, on_node: int) -> list[int] | None:
    """Which GPUs that are visible here are this task's own: the numbers for `local_device_ids`.

    Left alone, JAX takes the one GPU whose number is the task's, of eight on a node with one task,
    and one that is not there where Slurm shows each task only its own.

    Args:
      env: the environment.
      tasks: of this job on this host.
      index: which of them this is.
      on_node: GPUs of this job on this host, whether visible to this task or not.

    Returns:
      The numbers; [] to take all that is visible; None to leave it to JAX.

    Raises:
      UserError: the GPUs do not divide over the tasks.
    """
    if env.get("JAX_LOCAL_DEVICE_IDS"):
        return None  # JAX reads it
    if tasks == 1:
        return []
    gpus = _visible_gpus(env)
    if gpus == 0:
        return None  # CPUs; of AMD's GPUs, JAX's one for each task
    if gpus < max(on_node, tasks):
        return []  # somebody has divided them already
    if gpus % tasks:
        raise UserError(
            f"{gpus} GPUs do not divide over the {tasks} tasks of this host; start one task for "
            "the host, or one for each GPU"
        )
    share = gpus // tasks
    return list(range(index * share, (index + 1) * share))


def _visible_gpus(env: Environment) -> int:
    """NVIDIA GPUs that CUDA will show, without starting it."""
    named = env.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return _machine_gpus()
    return sum(name.strip() not in ("", "-1", "NoDevFiles") for name in named.split(","))


def _machine_gpus() -> int:
    """NVIDIA GPUs of the machine."""
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _number(env: Environment, name: str) -> int:
    value = env.get(name, "")
    if not value.isdecimal():
        raise UserError(
            f"{name} is {value!r}, no number; a job of several processes must say it to each"
        )
    return int(value)


def _check_index(name: str, index: int, count: int) -> None:
    if index >= count:
        raise UserError(f"{name} is {index}, but there are {count} processes: 0 to {count - 1}")
