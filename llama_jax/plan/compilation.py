"""Ahead-of-time compilation of the train step, for devices that may not be here."""

import contextlib
import dataclasses
import math
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from llama_jax.config import Config
from llama_jax.errors import UserError, one_line
from llama_jax.hardware.chips import GIB
from llama_jax.hardware.topology import captured_stderr
from llama_jax.hardware.xla_flags import flag_value
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import bytes_per_device, check_batch, with_shardings
from llama_jax.train.step import abstract_batch, jit_step

_WARNING = re.compile(r"(?i)involuntary full rematerialization")
_REPORT = "*.after_optimizations-memory-usage-report.txt"
_HEAP = re.compile(r"Memory Space: default .*\nTotal bytes: (\d+)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled train step, or the compiler's result that the step does not fit.

    Attributes:
      mesh: the mesh of the step.
      seconds: the time of the compilation.
      text: the optimised HLO; empty if the step does not fit.
      bytes: bytes of one device, by name; see `plan`.
      constraints: number of sharding constraints in the lowered program.
      warnings: the compiler's warnings about inefficient shardings.
    """

    mesh: jax.sharding.Mesh
    seconds: float
    text: str
    bytes: dict[str, int]
    constraints: int
    warnings: tuple[str, ...]


def with_slices(config: Config, slices: int) -> Config:
    """Returns the config for several slices: one replica on each, unless `dcn` says otherwise.

    Raises:
      UserError: `dcn` has another number of slices.
    """
    sizes = dataclasses.asdict(config.dcn)
    if slices == 1 or -1 in sizes.values():
        return config
    if math.prod(sizes.values()) == 1:
        return dataclasses.replace(config, dcn=dataclasses.replace(config.dcn, data=slices))
    if math.prod(sizes.values()) != slices:
        raise UserError(
            f"dcn {sizes} has {math.prod(sizes.values())} slices, not --slices={slices}; "
            f"try --config.dcn.data={slices}"
        )
    return config


def lower_step(config: Config, devices: list[jax.Device]) -> tuple[Any, Any, jax.sharding.Mesh]:
    """Lowers the train step for these devices; returns it, its abstract sharded state and its mesh.

    Raises:
      DoesNotDivide: the config does not divide over the mesh.
    """
    mesh = make_mesh(config.mesh, config.dcn, devices)
    train = config.train
    check_batch(train.global_batch, train.seq_len, train.grad_accum, mesh)
    # Use the abstract mesh, because arrays cannot be put on devices that are not here.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step = jit_step(config, mesh)
        state = step.placed_state()
        batch = abstract_batch(config)
        batch = with_shardings(batch, dict.fromkeys(batch, step.batch_sharding))
        return step.train.lower(state, batch), state, mesh


def compile_step(
    config: Config, devices: list[jax.Device], folder: pathlib.Path | None = None
) -> Compiled:
    """Compiles exactly the step that `train` runs.

    Args:
      config: the config of the step.
      devices: the devices of the step, or their descriptions.
      folder: the folder where the compiler of a TPU writes the scheduled program and its memory;
        None: that of XLA_FLAGS, or a temporary one.

    Raises:
      DoesNotDivide: the config does not divide over the mesh.
    """
    began = time.perf_counter()
    text, sizes = "", {}
    # XLA writes warnings only at this level, whatever TF_CPP_MIN_LOG_LEVEL was at import.
    jax.config.update("jax_logging_level", "WARNING")
    folder = folder or _dumped()
    place: Any = (
        contextlib.nullcontext(folder)
        if folder
        else tempfile.TemporaryDirectory(prefix="llama_jax_plan_")
    )
    with captured_stderr() as said, place as written_to:
        lowered, state, mesh = lower_step(config, devices)
        constraints = lowered.as_text().count("sdy.sharding_constraint")
        tpu = mesh.devices.flat[0].platform == "tpu"
        try:
            compiled = lowered.compile({"xla_dump_to": str(written_to)} if tpu else None)
        except jax.errors.JaxRuntimeError as error:
            sizes = _exhausted(str(error))
        else:
            text, memory = compiled.as_text(), compiled.memory_analysis()
            arguments = memory.argument_size_in_bytes
            written = memory.output_size_in_bytes - memory.alias_size_in_bytes
            beside = memory.temp_size_in_bytes + written
            if tpu:
                beside = heap_bytes(pathlib.Path(written_to)) - arguments
            sizes = {
                "arguments": arguments,
                "temporaries": beside,
                "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
            }
    parameters = bytes_per_device(state.params)
    sizes.setdefault("arguments", bytes_per_device(state))
    sizes.setdefault("temporaries", sizes.get("total", 0) - sizes["arguments"])
    sizes = {
        "parameters": parameters,
        "moments": bytes_per_device(state.opt_state),
        "gradients": parameters,
        "activations": max(0, sizes["temporaries"] - parameters),
        "total": sizes["arguments"] + sizes["temporaries"],
        **sizes,
    }
    if state.frozen is not None:
        sizes["frozen"] = bytes_per_device(state.frozen)
    warnings = tuple(line for line in said if _WARNING.search(line))
    seconds = time.perf_counter() - began
    return Compiled(mesh, seconds, text, sizes, constraints, warnings)


def _dumped() -> pathlib.Path | None:
    """Returns the local folder where XLA_FLAGS make XLA write programs; None if there is none."""
    folder = flag_value("--xla_dump_to")
    return pathlib.Path(folder) if folder and folder != "-" and "://" not in folder else None


def heap_bytes(folder: pathlib.Path) -> int:
    """Reads how many bytes of a TPU's main memory a program allocates, by the compiler's report.

    `memory_analysis` does not contain this figure: its sum of temporaries counts shared memory
    twice, and its peak includes memory that is offloaded to the host.

    Args:
      folder: the folder of the compiled step, see `compile_step`; uses the newest report in it.

    Raises:
      UserError: there is no report, or it has another form.
    """
    reports = sorted(folder.glob(_REPORT), key=lambda report: report.stat().st_mtime_ns)
    found = _HEAP.search(reports[-1].read_text()) if reports else None
    if found is None:
        raise UserError(f"the TPU's compiler has not reported the program's memory in {folder}")
    return int(found[1])


def _exhausted(message: str) -> dict[str, int]:
    """Reads the bytes that a program needs from the compiler's error; raises other errors again.

    Raises:
      UserError: the on-chip memory, not the main memory, is too small for an operation.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        raise jax.errors.JaxRuntimeError(message)
    found = re.search(r"Used ([\d.]+)G of [\d.]+G hbm|\(([\d.]+)G\) exceeds available HBM", message)
    if found:
        return {"total": int(float(found[1] or found[2]) * GIB)}
    told = re.search(
        r"Used [\d.]+\w of [\d.]+\w vmem|Scoped allocation [^\n]*exceeded scoped vmem limit",
        message,
    )
    raise UserError(
        "the compiler has too little on-chip memory for one of the operations ("
        f"{told[0] if told else one_line(message)}); try other compiler flags, such as "
        "--xla_preset=none, a smaller --config.model.attention_tile, or a larger "
        "--config.train.grad_accum"
    )
