"""Compiles the train step for a machine that is not here: does it fit, how fast, how long?

The compiler of the target runs on this computer, ahead of time (TPU: `pip install '.[tpu]'`). What
it says of memory and collectives is exact; step time is predicted from it, see `predict`.

Example:
  python -m llama_jax.plan --config=configs/7b.py --topology=v5p-128
  python -m llama_jax.plan --config=configs/65b.py --topology=v5p:8x8x8 --json \\
      --config.mesh.tensor=4
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from llama_jax import cli
from llama_jax.chips import CHIPS, GIB, Chip, chip_named
from llama_jax.config import Config
from llama_jax.errors import UserError
from llama_jax.hlo import Summary, summarize
from llama_jax.mesh import make_mesh
from llama_jax.sharding import check_batch
from llama_jax.step import abstract_state, jit_step


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPU chips.

    Attributes:
      chip: which.
      shape: chips along each dimension of the torus.
    """

    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(name: str) -> Topology:
    """`v5p-1024` (the cloud's name, which counts TensorCores on v4 and v5p) or `v5p:8x8x8`.

    Raises:
      UserError: an unknown chip, or a number or shape that its slices do not have.
    """
    found = re.fullmatch(r"([a-z][\w-]*?)(?:-(\d+)|:(\d+(?:x\d+)*))", name)
    known = ", ".join(chip.name for chip in CHIPS if chip.torus)
    chip = chip_named(found[1]) if found else None
    if found is None or chip is None or not chip.torus:
        raise UserError(f"unknown topology {name!r}; try v5p-1024 or v5p:8x8x8 (of {known})")
    if found[3]:
        shape = tuple(map(int, found[3].split("x")))
        if len(shape) != chip.torus or 0 in shape:
            raise UserError(f"{name}: a slice of {chip.name} has {chip.torus} dimensions")
        return Topology(chip, shape)
    chips, rest = divmod(int(found[2]), chip.cores_per_chip)
    shape_of = _cube(chips, chip.torus) if chips and not rest else None
    if shape_of is None:
        raise UserError(f"there is no slice {name}; say its shape, such as {chip.name}:4x4x4")
    return Topology(chip, shape_of)


def _cube(chips: int, dimensions: int) -> tuple[int, ...] | None:
    """The most cubic shape of so many chips; large 3-D slices are made of cubes of 4 x 4 x 4."""
    unit = 4 if dimensions == 3 and chips >= 64 else 1
    best = None
    for first in range(unit, chips + 1, unit):
        if chips % first:
            continue
        rest = chips // first
        tails = (
            [(rest,)]
            if dimensions == 2
            else [
                (second, rest // second)
                for second in range(unit, rest + 1, unit)
                if rest % second == 0 and rest // second % unit == 0
            ]
        )
        for tail in tails:
            shape = tuple(sorted((first, *tail)))
            if best is None or shape[-1] - shape[0] < best[-1] - best[0]:
                best = shape
    return best


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Descriptions of the chips, from the TPU compiler.

    Raises:
      UserError: the compiler is not installed, or knows no such slice.
    """
    from jax.experimental import topologies

    # The compiler alone, without asking a cloud where it runs.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        with _silent():
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=str(topology), **options
            )
    except Exception as error:  # JAX and the plugin raise what they like
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        missing = "not installed" in reason
        hint = "; pip install '.[tpu]' brings the TPU compiler" if missing else ""
        raise UserError(f"no topology {topology}: {reason}{hint}") from error
    return list(described.devices)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drops what a C++ library writes to standard error."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def compile_step(config: Config, devices: list[jax.Device]) -> tuple[Any, jax.sharding.Mesh, float]:
    """The compiled train step for these devices, its mesh, and the seconds it took.

    Raises:
      UserError: the config does not divide over the mesh.
    """
    mesh = make_mesh(config.mesh, config.dcn, devices)
    train = config.train
    check_batch(train.global_batch, train.seq_len, train.grad_accum, mesh)
    began = time.perf_counter()
    # The abstract mesh: nothing can be put on devices that are not here.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), _silent():
        step = jit_step(config, mesh)
        state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract_state(config),
            step.state_shardings,
        )
        shape = (train.global_batch, train.seq_len)
        dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
        batch = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=step.batch_sharding)
            for name, dtype in dtypes.items()
        }
        compiled = step.train.lower(state, batch).compile()
    return compiled, mesh, time.perf_counter() - began


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a step would take; seconds, and FLOPs of one chip.

    Attributes:
      flops: that one chip does, recomputation included.
      compute: seconds of these at the chip's peak.
      network: seconds of all collectives one after another at the links' speed.
      cycles: seconds of the compiler's own estimates; None where it gives none.
      step: the prediction.
    """

    flops: float
    compute: float
    network: float
    cycles: float | None
    step: float


def predict(config: Config, chip: Chip, chips: int, summary: Summary) -> Prediction:
    """Step time from the compiler's cycles and a roofline.

    The compiler estimates the cycles of everything but kernels (attention), whose FLOPs are added
    at half of the peak; no step can be faster than its FLOPs at the peak or its collectives at the
    links' speed. This has not been calibrated on hardware.
    """
    model, train = config.model, config.train
    tokens = train.tokens_per_step / chips
    attention = model.attention_flops_per_token(train.seq_len) * tokens
    total = model.flops_per_token(train.seq_len) * tokens
    recomputed = {"none": 0.0, "full": 1 / 3}.get(model.remat, 0.0)
    flops = total * (1 + recomputed)
    compute = flops / chip.peak_flops
    moved = sum(size for _, size in summary.collectives.values())
    network = moved / chip.link_bandwidth
    cycles = None
    if summary.cycles and chip.clock:
        kernels = attention * (1 + recomputed) / (0.5 * chip.peak_flops)
        cycles = summary.cycles / chip.clock + kernels
    return Prediction(flops, compute, network, cycles, max(compute, network, cycles or 0.0))


def plan(config: Config, topology: Topology) -> dict[str, Any]:
    """Compiles `config` for a topology and says what came of it.

    Returns:
      The object that `--json` prints; bytes are of one chip.

    Raises:
      UserError: as `topology_devices` and `compile_step`.
    """
    devices = topology_devices(topology)
    compiled, mesh, seconds = compile_step(config, devices)
    memory = compiled.memory_analysis()
    summary = summarize(compiled.as_text())
    chip = topology.chip
    chips = topology.chips
    prediction = predict(config, chip, chips, summary)
    train, model = config.train, config.model
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    rate = train.tokens_per_step / chips / prediction.step
    days = train.steps * prediction.step / 86_400
    return {
        "config": json.loads(config.to_json()),
        "topology": str(topology),
        "mesh": dict(mesh.shape),
        "chips": chips,
        "parameters": model.parameter_count(),
        "bytes_per_chip": {
            "arguments": arguments,  # the state, donated, and the batch
            "temporaries": temporaries,
            "total": arguments + temporaries,
            "capacity": int(chip.hbm_bytes),
        },
        "fits": arguments + temporaries <= chip.hbm_bytes,
        "collectives": {
            kind: {"count": count, "bytes": size}
            for kind, (count, size) in summary.collectives.items()
        },
        "flops_per_chip": prediction.flops,
        "seconds": {
            "compute_at_peak": prediction.compute,
            "network": prediction.network,
            "compiler_cycles": prediction.cycles,
        },
        "step_seconds": prediction.step,
        "tokens_per_second_per_chip": rate,
        "mfu_6n": 6 * model.parameter_count() * rate / chip.peak_flops,
        "mfu_attention": model.flops_per_token(train.seq_len) * rate / chip.peak_flops,
        "days": days,
        "chip_hours": days * 24 * chips,
        "compile_seconds": seconds,
    }


def table(result: dict[str, Any]) -> str:
    """The plan for people."""
    sizes = {name: size / GIB for name, size in result["bytes_per_chip"].items()}
    room = sizes["capacity"] - sizes["total"]
    shape = " x ".join(f"{name}={size}" for name, size in result["mesh"].items())
    lines = [
        f"topology     {result['topology']}: {result['chips']} chips, {shape}",
        f"parameters   {result['parameters']:,}",
        f"memory       {sizes['arguments']:.2f} GiB state and batch + "
        f"{sizes['temporaries']:.2f} GiB temporaries = {sizes['total']:.2f} of "
        f"{sizes['capacity']:.0f} GiB a chip",
        f"fits         yes, {room:.2f} GiB are free"
        if result["fits"]
        else f"fits         NO, {-room:.2f} GiB are missing: take more chips, raise mesh.tensor or "
        "train.grad_accum, or lower train.global_batch; model.remat=full keeps least",
    ]
    for kind, one in result["collectives"].items():
        lines.append(f"collectives  {one['count']:,} {kind}, {one['bytes'] / 1e9:.2f} GB a step")
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value:.3f}"
        for name, value in result["seconds"].items()
        if value is not None
    )
    lines += [
        f"step         {result['step_seconds']:.3f} s predicted ({parts})",
        f"speed        {result['tokens_per_second_per_chip']:,.0f} tokens/s/chip, MFU "
        f"{result['mfu_6n']:.1%} (6N), {result['mfu_attention']:.1%} (with attention)",
        f"run          {result['days']:,.1f} days, {result['chip_hours']:,.0f} chip hours",
        f"compiled in  {result['compile_seconds']:.0f} s; times are predictions, not measurements",
    ]
    return "\n".join(lines)


def main() -> None:
    """The command; flags are defined below."""
    config = cli.load_config(_CONFIG)
    if _TOPOLOGY.value is None:
        raise UserError("--topology is missing; try --topology=v5p-128")
    topology = parse_topology(_TOPOLOGY.value)
    jax.config.update("jax_platforms", "cpu")  # the compiler needs no device
    result = plan(config, topology)
    print(json.dumps(result) if _JSON.value else table(result))


if __name__ == "__main__":
    _CONFIG = cli.config_flag()
    _TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice, such as v5p-1024 or v5p:8x8x8.")
    _JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
    cli.run(main, __doc__)
