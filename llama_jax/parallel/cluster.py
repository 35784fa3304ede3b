"""Joins the processes of one job: finds the cluster, and the devices of this process.

Only command modules import this module, before any code uses a device. A cluster is recognised by
its environment variables alone, so that a single process on a laptop never uses the network and
never waits. JAX finds what it can by itself (mostly addresses); this module replaces the parts that
JAX gets wrong, or where it aborts instead of raising.
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
# Seconds without a heartbeat after which a process counts as dead and all others end.
HEARTBEAT_S = 25
# Seconds in which all processes must have started.
MEETING_S = 300
# Slurm sets these for a task that `srun` started; a batch script has no SLURM_STEP_NODELIST.
_SLURM_TASK = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")

Environment = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Job:
    """The job that this process belongs to, as its environment describes it.

    Attributes:
      means: how the job was found, such as "Slurm"; for messages.
      processes: the number of processes; None if only JAX can find out.
      process_zero: where process 0 is expected; for messages.
      arguments: keyword arguments for `jax.distributed.initialize`.
    """

    means: str
    processes: int | None
    process_zero: str
    arguments: dict[str, Any]


def join_job(timeout_s: int = MEETING_S) -> str:
    """Joins the other processes of the job, if the environment names any.

    Args:
      timeout_s: seconds to wait for the other processes; after that, this process ends with one
        line and status 1. JAX itself would abort with a stack trace that no `except` can catch.

    Returns:
      How the job was found, such as "Slurm"; "" for a single process.

    Raises:
      UserError: the variables are incomplete or wrong, or the processes cannot be joined.
    """
    job = find_job(os.environ)
    if job is None or job.processes == 1:
        return ""
    watchdog = threading.Timer(timeout_s, _give_up, (job, timeout_s))
    watchdog.daemon = True
    watchdog.start()
    # The service would swallow SIGTERM from here on; `StopRequest` enables it later.
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
    """Ends the process, because the thread that waits in JAX cannot be interrupted."""
    total = f"{job.processes} " if job.processes else ""
    print(
        f"error: the {total}processes of this job, found by {job.means}, did not all meet at "
        f"process 0 ({job.process_zero}) within {timeout_s} s; check that all of them run and can "
        f"reach that address, or set another one with {ADDRESS}=HOST:PORT",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def find_job(env: Environment) -> Job | None:
    """Finds the job that the variables describe; returns None if they do not describe one.

    In a cluster, JAX_COORDINATOR_ADDRESS alone replaces the address that the cluster gives.

    Raises:
      UserError: the variables are incomplete, or contain impossible numbers.
    """
    if COUNT in env or INDEX in env:
        return _plain(env)
    for cluster in (_open_mpi, _slurm, _tpu_pods):  # mpirun on Slurm counts as Open MPI
        job = cluster(env)
        if job is not None:
            return job
    return _plain(env) if ADDRESS in env else _tpu_vm(env)


def _plain(env: Environment) -> Job:
    """Reads our three variables; takes all GPUs of the host, or those of JAX_LOCAL_DEVICE_IDS."""
    count = _number(env, COUNT)
    if count == 1 and ADDRESS not in env and INDEX not in env:
        return Job("environment", 1, "here", {})
    index = _number(env, INDEX)
    address = env.get(ADDRESS, "")
    if not re.fullmatch(r"\S+:\d+", address):
        raise UserError(f"{ADDRESS} is {address!r}, which is not HOST:PORT")
    _check_index(INDEX, index, count)
    arguments = {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        # Otherwise JAX would still detect Slurm, and use only the one GPU that Slurm suggests.
        "cluster_detection_method": "deactivate",
    }
    return Job("environment", count, address, arguments)


def _open_mpi(env: Environment) -> Job | None:
    """Describes a process that `mpirun` started."""
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    count, index = _number(env, "OMPI_COMM_WORLD_SIZE"), _number(env, "OMPI_COMM_WORLD_RANK")
    _check_index("OMPI_COMM_WORLD_RANK", index, count)
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    if count > 1 and not uri and ADDRESS not in env:
        raise UserError(
            "this version of Open MPI does not say where process 0 is; set it with "
            f"mpirun -x {ADDRESS}=HOST:PORT (of the first host)"
        )
    local = (_number(env, "OMPI_COMM_WORLD_LOCAL_SIZE"), _number(env, "OMPI_COMM_WORLD_LOCAL_RANK"))
    arguments = {
        "num_processes": count,
        "process_id": index,
        "local_device_ids": _own_devices(env, *local, _machine_gpus()),
        # Without a URI, newer JAX would ask mpi4py even for the values that are given here.
        "cluster_detection_method": "ompi" if uri else "deactivate",
    }
    return Job("Open MPI", count, env.get(ADDRESS, f"the host of mpirun, {uri}"), arguments)


def _slurm(env: Environment) -> Job | None:
    """Describes a task that `srun` started.

    Counts the tasks of the step. JAX counts those of the job (SLURM_NTASKS), and would wait
    forever in the shell of an interactive job, which is a step of one task.
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
    """Returns the number of the step's tasks on this node; Slurm lists them as `2(x3),1`."""
    listed = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "1"
    tasks: list[int] = []
    for part in listed.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {listed!r}, not of the form '2(x3),1'")
        tasks += [int(found[1])] * int(found[2] or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return tasks[node] if node < len(tasks) else tasks[-1]


def _tpu_pods(env: Environment) -> Job | None:
    """Describes a worker of one or several TPU slices in GKE, which sets these variables."""
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
        # Without these variables, JAX would treat every slice as the first one.
        _check_index("MEGASCALE_SLICE_ID", _number(env, "MEGASCALE_SLICE_ID"), slices)
        address = env.get("MEGASCALE_COORDINATOR_ADDRESS", "")
        if not address:
            raise UserError("MEGASCALE_NUM_SLICES is set, MEGASCALE_COORDINATOR_ADDRESS is not")
    arguments = {"cluster_detection_method": "gketpu"}
    return Job("GKE", workers * slices, env.get(ADDRESS, address), arguments)


def _tpu_vm(env: Environment) -> Job | None:
    """Describes a Cloud TPU VM, whose metadata server knows the other hosts.

    At import, JAX sets TPU_ML_PLATFORM if it finds chips and their library, and
    TPU_SKIP_MDS_QUERY if it finds no chips.
    """
    platforms = env.get("JAX_PLATFORMS", "")
    if "TPU_ML_PLATFORM" not in env or "TPU_SKIP_MDS_QUERY" in env:
        return None
    if platforms and "tpu" not in platforms:
        return None
    first = env.get(ADDRESS, "the first worker of the slice")
    return Job("TPU metadata", None, first, {"cluster_detection_method": "gcetpu"})


def _own_devices(env: Environment, tasks: int, index: int, on_node: int) -> list[int] | None:
    """Returns the numbers of the visible GPUs that belong to this task, for `local_device_ids`.

    By default, JAX takes the one GPU whose number is that of the task. On a node with one task this
    is one GPU of eight; if Slurm shows each task only its own GPUs, that GPU may not exist.

    Args:
      env: the environment variables.
      tasks: number of this job's tasks on this host.
      index: index of this task among them.
      on_node: number of this job's GPUs on this host, visible to this task or not.

    Returns:
      The numbers; [] to take all visible GPUs; None to let JAX decide.

    Raises:
      UserError: the tasks do not divide the GPUs evenly.
    """
    if env.get("JAX_LOCAL_DEVICE_IDS"):
        return None  # JAX reads it
    if tasks == 1:
        return []
    gpus = _visible_gpus(env)
    if gpus == 0:
        return None  # CPUs; or AMD GPUs, of which JAX takes one per task
    if gpus < max(on_node, tasks):
        return []  # the launcher has divided them already
    if gpus % tasks:
        raise UserError(
            f"{gpus} GPUs do not divide over the {tasks} tasks of this host; start one task per "
            "host, or one per GPU"
        )
    share = gpus // tasks
    return list(range(index * share, (index + 1) * share))


def _visible_gpus(env: Environment) -> int:
    """Counts the NVIDIA GPUs that CUDA will show, without starting CUDA."""
    named = env.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return _machine_gpus()
    return sum(name.strip() not in ("", "-1", "NoDevFiles") for name in named.split(","))


def _machine_gpus() -> int:
    """Counts the NVIDIA GPUs of the machine."""
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _number(env: Environment, name: str) -> int:
    value = env.get(name, "")
    if not value.isdecimal():
        raise UserError(f"{name} is {value!r}, not a number; set it for each process of the job")
    return int(value)


def _check_index(name: str, index: int, count: int) -> None:
    if index >= count:
        raise UserError(f"{name} is {index}, but there are {count} processes: 0 to {count - 1}")
