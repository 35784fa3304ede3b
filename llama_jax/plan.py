"""Compiles the train step for a machine that is not here: does it fit, how fast, how long?

The compiler of the target runs on this computer, ahead of time (TPU: `pip install '.[tpu]'`, GPU:
`pip install '.[cuda13]'`). What it says of memory and collectives is exact; the time of a step is
predicted from its schedule and the chip's data sheet, see predict.py. Compiler flags are given as
in training: --xla_preset, and XLA_FLAGS, for TPUs LIBTPU_INIT_ARGS, for your own.

Example:
  python -m llama_jax.plan --config=configs/7b.py --topology=v5p-128
  python -m llama_jax.plan --config=configs/65b.py --topology=v5p:8x8x8 --json \\
      --config.mesh.tensor=4
  python -m llama_jax.plan --config=configs/65b.py --topology=a100-80g:256x8 --price=1.50 \\
      --xla_preset=ampere --config.mesh.data=8 --config.model.remat=dots
  python -m llama_jax.plan --config=configs/7b.py --topology=v5e-256 --slices=2
  python -m llama_jax.plan --config=configs/13b.py --topology=h100:32x8 --search
"""

import dataclasses
import json
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from llama_jax import cli, xla_flags
from llama_jax.chips import GIB
from llama_jax.config import Config
from llama_jax.errors import UserError
from llama_jax.hlo import parse, summarize
from llama_jax.mesh import make_mesh
from llama_jax.predict import Prediction, predict
from llama_jax.sharding import check_batch
from llama_jax.step import abstract_state, jit_step
from llama_jax.topology import Topology, captured, node_of, parse_topology, topology_devices

_WARNING = re.compile(r"(?i)involuntary full rematerialization")


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
      UserError: the config does not divide over the mesh.
    """
    mesh = make_mesh(config.mesh, config.dcn, devices)
    train = config.train
    check_batch(train.global_batch, train.seq_len, train.grad_accum, mesh)
    # The abstract mesh: nothing can be put on devices that are not here.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
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
        return step.train.lower(state, batch), state, mesh


def compile_step(config: Config, devices: list[jax.Device]) -> Compiled:
    """Compiles the very step that `train` runs.

    Raises:
      UserError: the config does not divide over the mesh.
    """
    began = time.perf_counter()
    text, sizes = "", {}
    with captured() as said:
        lowered, state, mesh = lower_step(config, devices)
        constraints = lowered.as_text().count("sdy.sharding_constraint")
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            sizes = _exhausted(str(error))
        else:
            text, memory = compiled.as_text(), compiled.memory_analysis()
            sizes = {
                "arguments": memory.argument_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes,
                "host": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
            }
    parameters = _bytes_per_device(state.params)
    sizes.setdefault("arguments", _bytes_per_device(state))
    sizes.setdefault("temporaries", sizes.get("total", 0) - sizes["arguments"])
    sizes = {
        "parameters": parameters,
        "moments": _bytes_per_device(state.opt_state),
        "gradients": parameters,
        "activations": max(0, sizes["temporaries"] - parameters),
        "total": sizes["arguments"] + sizes["temporaries"],
        **sizes,
    }
    warnings = tuple(line for line in said if _WARNING.search(line))
    seconds = time.perf_counter() - began
    return Compiled(mesh, seconds, text, sizes, constraints, warnings)


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _exhausted(message: str) -> dict[str, int]:
    """The compiler's figure for what it needs, from its words; other errors are raised again."""
    if "RESOURCE_EXHAUSTED" not in message:
        raise jax.errors.JaxRuntimeError(message)
    found = re.search(r"Used ([\d.]+)G of|\(([\d.]+)G\) exceeds available HBM", message)
    return {"total": int(float(found[1] or found[2]) * GIB)} if found else {"total": 0}


def plan(config: Config, topology: Topology, price: float = 0.0) -> dict[str, Any]:
    """Compiles `config` for a topology and says what came of it.

    Args:
      config: the run.
      topology: the machine.
      price: of one chip for one hour; 0: not known.

    Returns:
      The object that `--json` prints. Bytes are of one chip; `total` is `arguments` (the state,
      donated, and the batch) and `temporaries`; of these, `gradients` are what the state's are, and
      `activations` all else. Where the program does not fit, what needs it compiled is null.

    Raises:
      UserError: as `topology_devices` and `compile_step`.
    """
    chip, train, model = topology.chip, config.train, config.model
    config = with_slices(config, topology.slices)
    devices = topology_devices(topology)
    try:
        compiled = compile_step(config, devices)
    except UserError as error:
        if "divide" not in str(error) and "does not cover" not in str(error):
            raise
        from llama_jax.search import what_divides

        raise UserError(f"{error}; {what_divides(config, topology)}") from error
    each = chip.devices_per_chip
    sizes = {name: size * each for name, size in compiled.bytes.items()}
    sizes["capacity"] = int(chip.hbm_bytes) * each
    result: dict[str, Any] = {
        "config": json.loads(config.to_json()),
        "topology": str(topology),
        "mesh": dict(compiled.mesh.shape),
        "chips": topology.chips,
        "parameters": model.parameter_count(),
        "bytes_per_chip": sizes,
        "fits": bool(compiled.text) and sizes["total"] <= sizes["capacity"],
        "sharding_constraints": compiled.constraints,
        "warnings": list(compiled.warnings),
        "compile_seconds": compiled.seconds,
    }
    if not compiled.text:
        names = "collectives collectives_by_dtype lookup_collectives flops_per_chip seconds "
        names += "step_seconds tokens_per_second_per_chip mfu_6n mfu_attention days chip_hours cost"
        return {**result, **dict.fromkeys(names.split())}
    summary = summarize(compiled.text)
    nodes = [node_of(device) for device in compiled.mesh.devices.flat]
    prediction = predict(parse(compiled.text), chip, nodes)
    tokens = train.tokens_per_step / topology.devices
    if prediction.flops < model.flops_per_token(train.seq_len) * tokens * 0.95:
        found = prediction.flops / tokens / model.flops_per_token(train.seq_len)
        result["warnings"].append(f"only {found:.0%} of the FLOPs are found in the program")
    rate = train.tokens_per_step / topology.chips / prediction.step
    days = train.steps * prediction.step / 86_400
    hours = days * 24 * topology.chips
    return {
        **result,
        "collectives": _counted(summary.collectives),
        "collectives_by_dtype": _counted(summary.by_dtype),
        "lookup_collectives": summary.lookup,
        "flops_per_chip": prediction.flops * each,
        "hbm_bytes_per_chip": prediction.memory_bytes * each,
        "seconds": _seconds(prediction),
        "step_seconds": prediction.step,
        "tokens_per_second_per_chip": rate,
        "mfu_6n": 6 * model.parameter_count() * rate / (chip.peak_flops * each),
        "mfu_attention": model.flops_per_token(train.seq_len) * rate / (chip.peak_flops * each),
        "days": days,
        "chip_hours": hours,
        "cost": hours * price if price else None,
    }


def _counted(collectives: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {name: {"count": count, "bytes": size} for name, (count, size) in collectives.items()}


def _seconds(prediction: Prediction) -> dict[str, float | None]:
    return {
        "compute_at_peak": prediction.compute,
        "hbm": prediction.memory,
        "network": prediction.network,
        "network_exposed": prediction.exposed,
        "compiler_cycles": prediction.cycles,
    }


def table(result: dict[str, Any]) -> str:
    """The plan for people."""
    sizes = {name: size / GIB for name, size in result["bytes_per_chip"].items()}
    room = sizes["capacity"] - sizes["total"]
    shape = " x ".join(f"{name}={size}" for name, size in result["mesh"].items())
    lines = [
        f"topology     {result['topology']}: {result['chips']:,} chips, {shape}",
        f"parameters   {result['parameters']:,}",
    ]
    for name in ("parameters", "moments", "gradients", "activations", "host"):
        if sizes.get(name):
            lines.append(f"  {name:<11}{sizes[name]:8.2f} GiB a chip")
    lines.append(
        f"memory       {sizes['arguments']:.2f} GiB state and batch + "
        f"{sizes['temporaries']:.2f} GiB temporaries = {sizes['total']:.2f} of "
        f"{sizes['capacity']:.2f} GiB a chip"
    )
    lines.append(
        f"fits         yes, {room:.2f} GiB are free"
        if result["fits"]
        else f"fits         NO, {-room:.2f} GiB are missing"
    )
    lines += [f"would fit    {line}" for line in result.get("would_fit", ())]
    lines += [f"warning      {line}" for line in result["warnings"]]
    if result["step_seconds"] is not None:
        lines += _times(result)
    lines.append(
        f"compiled in  {result['compile_seconds']:.0f} s; times are predictions, not measurements"
    )
    return "\n".join(lines)


def _times(result: dict[str, Any]) -> list[str]:
    lines = [
        f"collectives  {one['count']:,} {kind}, {one['bytes'] / 1e9:.2f} GB a step"
        for kind, one in result["collectives_by_dtype"].items()
        if one["bytes"] >= 1e7
    ]
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value:.3f}"
        for name, value in result["seconds"].items()
        if value is not None
    )
    lines += [
        f"work         {result['flops_per_chip'] / 1e12:,.0f} TFLOP and "
        f"{result['hbm_bytes_per_chip'] / 1e9:,.0f} GB of memory traffic a chip and step",
        f"step         {result['step_seconds']:.3f} s predicted ({parts})",
        f"speed        {result['tokens_per_second_per_chip']:,.0f} tokens/s/chip, MFU "
        f"{result['mfu_6n']:.1%} (6N), {result['mfu_attention']:.1%} (with attention)",
    ]
    cost = "" if result["cost"] is None else f", {result['cost']:,.0f} dollars"
    lines.append(
        f"run          {result['days']:,.1f} days, {result['chip_hours']:,.0f} chip hours{cost}"
    )
    return lines


def main() -> None:
    """The command; flags are defined below."""
    from llama_jax import search  # which compiles plans

    config = cli.load_config(_CONFIG)
    if _TOPOLOGY.value is None:
        raise UserError("--topology is missing; try --topology=v5p-128 or --topology=h100:256x8")
    topology = parse_topology(_TOPOLOGY.value, _SLICES.value)
    xla_flags.use_preset(_XLA_PRESET.value)
    jax.config.update("jax_platforms", "cpu")  # the compiler needs no device
    if _SEARCH.value:
        result = search.search(config, topology, _SEARCH_LIMIT.value, _PRICE.value)
    else:
        result = plan(config, topology, _PRICE.value)
        if not result["fits"]:
            result["would_fit"] = search.advice(config, topology, result)
    print(json.dumps(result) if _JSON.value else table(result))


if __name__ == "__main__":
    _CONFIG = cli.config_flag()
    _TOPOLOGY = flags.DEFINE_string(
        "topology",
        None,
        "TPU slice, such as v5p-1024 or v5p:8x8x8, or nodes x GPUs, such as h100:256x8.",
    )
    _SLICES = flags.DEFINE_integer("slices", 1, "TPU slices; dcn must multiply to them.")
    _PRICE = flags.DEFINE_float("price", 0.0, "Dollars per chip and hour, for the cost of the run.")
    _SEARCH = flags.DEFINE_bool(
        "search", False, "Try mesh shapes, remat policies and microbatches; show the best that fit."
    )
    _SEARCH_LIMIT = flags.DEFINE_integer("search_limit", 6, "Candidates that --search compiles.")
    _XLA_PRESET = flags.DEFINE_string(
        "xla_preset", "none", f"Compiler flags, as of train: {', '.join(xla_flags.PRESETS)}."
    )
    _JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
    cli.run(main, __doc__)
