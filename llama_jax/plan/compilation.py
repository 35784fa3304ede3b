"""The train step, compiled ahead of time for devices that may not be here."""

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
    """A compiled train step, or the compiler's word that it does not fit.

    Attributes:
      mesh: where it runs.
      seconds: that compiling took.
      text: the optimised HLO; empty if it does not fit.
      bytes: of one device, by name, see `plan`.
      constraints: sharding constraints in the program as it is lowered.
      warnings: lines in which the compiler says that it works around our shardings.
    """

    mesh: jax.sharding.Mesh
    seconds: float
    text: str
    bytes: dict[str, int]
    constraints: int
    warnings: tuple[str, ...]


def with_slices(config: Config, slices: int) -> Config:
    """The config on several slices: one replica on each, unless `dcn` says otherwise.

    Raises:
      UserError: `dcn` asks for another number of slices.
    """
    sizes = dataclasses.asdict(config.dcn)
    if slices == 1 or -1 in sizes.values():
        return config
    if math.prod(sizes.values()) == 1:
        return dataclasses.replace(config, dcn=dataclasses.replace(config.dcn, data=slices))
    if math.prod(sizes.values()) != slices:
        raise UserError(
            f"dcn {sizes} is of {math.prod(sizes.values())} slices, not of --slices={slices}; "
            f"try --config.dcn.data={slices}"
        )
    return config


def lower_step(config: Config, devices: list[jax.Device]) -> tuple[Any, Any, jax.sharding.Mesh]:
    """The lowered train step for these devices, its abstract state with shardings, and its mesh.

    Raises:
      DoesNotDivide: the config does not divide over the mesh.
    """
    mesh = make_mesh(config.mesh, config.dcn, devices)
    train = config.train
    check_batch(train.global_batch, train.seq_len, train.grad_accum, mesh)
    # The abstract mesh: nothing can be put on devices that are not here.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        step = jit_step(config, mesh)
        state = step.placed_state()
        batch = abstract_batch(config)
        batch = with_shardings(batch, dict.fromkeys(batch, step.batch_sharding))
        return step.train.lower(state, batch), state, mesh


def compile_step(
    config: Config, devices: list[jax.Device], folder: pathlib.Path | None = None
) -> Compiled:
    """Compiles the very step that `train` runs.

    Args:
      config: of the step.
      devices: where it runs; they need not be here.
      folder: where the compiler of a TPU writes the program and its memory once they are scheduled;
        None: where XLA_FLAGS say, or else one that is removed at the end.

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
    """The folder of this machine to which XLA_FLAGS ask for all programs; "-" is no folder."""
    folder = flag_value("--xla_dump_to")
    return pathlib.Path(folder) if folder and folder != "-" and "://" not in folder else None


def heap_bytes(folder: pathlib.Path) -> int:
    """Bytes of a TPU's main memory that a program allocates, as its compiler reports them.

    `memory_analysis` has no such figure: its sum of temporaries counts twice what shares memory,
    and its peak counts what is offloaded to the host.

    Args:
      folder: of the compiled step, see `compile_step`; the newest report in it counts.

    Raises:
      UserError: there is no report, or it is of another form.
    """
    reports = sorted(folder.glob(_REPORT), key=lambda report: report.stat().st_mtime_ns)
    found = _HEAP.search(reports[-1].read_text()) if reports else None
    if found is None:
        raise UserError(f"the TPU's compiler has not reported the program's memory in {folder}")
    return int(found[1])


def _exhausted(message: str) -> dict[str, int]:
    """The compiler's figure for what it needs, from its words; other errors are raised again.

    Raises:
      UserError: another memory than the device's main one is too small for an operation.
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
