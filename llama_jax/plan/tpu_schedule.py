"""The TPU compiler's schedule of the train step, without generating code.

Code generation takes nine tenths of the time of a compilation. Before it begins, the compiler
writes the scheduled program and its memory to a folder. A separate process compiles, and ends as
soon as these files exist. They give exact memory, collectives and FLOPs. Cycles come only with the
code, so compute time is derived from FLOPs.
"""

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
import time

from llama_jax.config import Config, from_json
from llama_jax.errors import UserError, first_line
from llama_jax.hardware.topology import Topology, parse_topology, topology_devices
from llama_jax.parallel.mesh import make_mesh
from llama_jax.plan.compilation import compile_step, heap_bytes
from llama_jax.plan.estimate import TPU_PRODUCTS
from llama_jax.plan.hlo import parse
from llama_jax.plan.roofline import predict_on

_PATIENCE = 1800  # seconds that the compiler may take for one candidate
_POLL = 0.05  # seconds
# The compiler writes _LAST after _PROGRAM and after the memory report.
_PROGRAM = "*.after_optimizations.txt"
_LAST = "*.after_optimizations_after_buffer_assignment.txt"


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A scheduled train step; bytes, seconds and FLOPs are those of one device.

    Attributes:
      total: bytes of arguments and temporaries.
      fits: whether they fit into the device's memory.
      seconds: approximate seconds of a step: FLOPs at `TPU_PRODUCTS` of the peak, plus exposed
        network time; None if the compiler stopped because the step does not fit.
      exposed: seconds of the network that no compute hides; None likewise.
      flops: FLOPs of a step, recomputation included; None likewise.
    """

    total: int
    fits: bool
    seconds: float | None = None
    exposed: float | None = None
    flops: float | None = None


def available(topology: Topology) -> bool:
    """Returns whether a schedule can be made: only for TPUs, if their compiler is installed."""
    return bool(topology.chip.torus) and importlib.util.find_spec("libtpu") is not None


def schedule(config: Config, topology: Topology) -> Scheduled:
    """Compiles a train step up to its schedule.

    Raises:
      UserError: the step does not compile; the message says why in one line.
    """
    with tempfile.TemporaryDirectory(prefix="llama_jax_plan_") as folder:
        needed = _compile(config, topology, pathlib.Path(folder))
        if needed is not None:
            return Scheduled(needed, False)
        return _read(config, topology, pathlib.Path(folder))


def _compile(config: Config, topology: Topology, folder: pathlib.Path) -> int | None:
    """Compiles into a folder in another process; if the step does not fit, returns its bytes."""
    asked = {"config": json.loads(config.to_json()), "topology": topology.slice_name}
    asked |= {"slices": topology.slices, "folder": str(folder)}
    package = str(pathlib.Path(__file__).parents[__name__.count(".")])  # the folder of llama_jax
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        text=True,
        errors="replace",
    ) as process:
        try:
            said, errors = process.communicate(json.dumps(asked), timeout=_PATIENCE)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise UserError(f"the compiler has not scheduled the step in {_PATIENCE} s") from error
        except BaseException:  # Ctrl-C
            process.kill()
            process.wait()
            raise
    lines = said.splitlines()
    answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if "error" in answer:
        raise UserError(answer["error"])
    if "total" in answer:
        return int(answer["total"])
    if not list(folder.glob(_LAST)):
        reasons = [line for line in errors.splitlines() if line.strip()]
        last = reasons[-1] if reasons else "it gives no reason"
        raise UserError(f"the compiler ended with status {process.returncode}: {last}")
    return None


def _read(config: Config, topology: Topology, folder: pathlib.Path) -> Scheduled:
    total = heap_bytes(folder)
    module = parse(next(folder.glob(_PROGRAM)).read_text())
    placed = list(make_mesh(config.mesh, config.dcn, topology_devices(topology)).devices.flat)
    # Without cycles, only products count: the traffic of fusions would be wrong, because the
    # compiler keeps some of their operands in vector memory.
    chip = dataclasses.replace(
        topology.chip, clock=None, hbm_bandwidth=math.inf, matmul_efficiency=TPU_PRODUCTS
    )
    result = predict_on(topology, placed, module, chip)
    fits = total <= topology.chip.hbm_bytes
    return Scheduled(total, fits, result.step, result.exposed, result.flops)


def _watch(folder: pathlib.Path, parent: int) -> None:
    """Ends this process when the schedule exists, or when the parent process has ended."""
    while True:
        if os.getppid() != parent:
            shutil.rmtree(folder, ignore_errors=True)
            os._exit(1)
        if next(folder.glob(_LAST), None):
            os._exit(0)
        time.sleep(_POLL)


def _main() -> None:
    """Compiles the request on standard input; writes an answer if there is no schedule."""
    parent = os.getppid()
    asked = json.load(sys.stdin)
    folder = pathlib.Path(asked["folder"])
    threading.Thread(target=_watch, args=(folder, parent), daemon=True).start()
    answer: dict[str, object]

    try:
        with contextlib.redirect_stdout(sys.stderr):
            topology = parse_topology(asked["topology"], asked["slices"])
            config = from_json(json.dumps(asked["config"]))
            compiled = compile_step(config, topology_devices(topology), folder)
            answer = {} if compiled.text else {"total": compiled.bytes["total"]}
    except Exception as error:  # the parent process reports it in one line
        answer = {"error": first_line(error)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
