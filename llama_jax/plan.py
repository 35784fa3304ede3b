"""Compiles the train step for a machine that is not here: does it fit, how fast, how long?

The compiler of the target runs on this computer, ahead of time (TPU: `pip install '.[tpu]'`, GPU:
`pip install '.[cuda13]'`). What it says of memory and collectives is exact; the time of a step is
predicted from its schedule and the chip's data sheet, see predict.py. Compiler flags are given as
in training: those of a TPU by default, others by --xla_preset; XLA_FLAGS, for TPUs
LIBTPU_INIT_ARGS, are for your own.

Example:
  python -m llama_jax.plan --config=configs/7b.py --topology=v5p-128
  python -m llama_jax.plan --config=configs/65b.py --topology=v5p:8x8x8 --json \\
      --config.mesh.tensor=4
  python -m llama_jax.plan --config=configs/65b.py --topology=a100-80g:256x8 --price=1.50 \\
      --xla_preset=ampere --config.mesh.data=8 --config.model.remat=dots
  python -m llama_jax.plan --config=configs/7b.py --topology=v5e-256 --slices=2
  python -m llama_jax.plan --config=configs/13b.py --topology=h100:32x8 --search
  python -m llama_jax.plan --calibration
"""

import json
import math
from typing import Any

import jax
from absl import flags

from llama_jax import calibration, cli, xla_flags
from llama_jax.ahead import compile_step, with_slices
from llama_jax.chips import GIB
from llama_jax.config import Config
from llama_jax.cost import flops_per_token, parameter_count
from llama_jax.errors import UserError
from llama_jax.hlo import parse, summarize
from llama_jax.predict import Prediction, predict
from llama_jax.topology import Topology, node_of, parse_topology, topology_devices, torus_of


def plan(config: Config, topology: Topology, price: float = 0.0) -> dict[str, Any]:
    """Compiles `config` for a topology and says what came of it.

    Args:
      config: the run.
      topology: the machine.
      price: of one chip for one hour; 0: not known.

    Returns:
      The object that `--json` prints. Bytes are of one chip; `total` is `arguments` (the state,
      donated, and the batch) and `temporaries`; of these, `gradients` are what the state's are, and
      `activations` all else; with LoRA, `frozen` is the base. Where the program does not fit, what
      needs it compiled is null.

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
        "parameters": parameter_count(model),
        "bytes_per_chip": sizes,
        "fits": bool(compiled.text) and sizes["total"] <= sizes["capacity"],
        "sharding_constraints": compiled.constraints,
        "warnings": list(compiled.warnings),
        "compile_seconds": compiled.seconds,
        "calibration": calibration.summary(chip.name),
    }
    if not compiled.text:
        names = "collectives collectives_by_dtype collectives_async collectives_sync "
        names += "lookup_collectives flops_per_chip hbm_bytes_per_chip estimated_cycles seconds "
        names += "exposed_seconds "
        names += "step_seconds tokens_per_second_per_chip mfu_6n mfu_attention days chip_hours cost"
        return {**result, **dict.fromkeys(names.split())}
    summary = summarize(compiled.text)
    placed = list(compiled.mesh.devices.flat)
    nodes = [node_of(device) for device in placed]
    prediction = predict(parse(compiled.text), chip, nodes, torus_of(topology, placed))
    tokens = train.tokens_per_step / topology.devices
    each_token = flops_per_token(model, config.lora, train.seq_len)
    if prediction.flops < each_token * tokens * 0.95:
        found = prediction.flops / tokens / each_token
        result["warnings"].append(f"only {found:.0%} of the FLOPs are found in the program")
    rate = train.tokens_per_step / topology.chips / prediction.step
    days = train.steps * prediction.step / 86_400
    hours = days * 24 * topology.chips
    return {
        **result,
        "collectives": _counted(summary.collectives),
        "collectives_by_dtype": _counted(summary.by_dtype),
        "collectives_async": _counted(summary.asynchronous),
        "collectives_sync": _counted(summary.synchronous),
        "lookup_collectives": summary.lookup,
        "flops_per_chip": prediction.flops * each,
        "hbm_bytes_per_chip": prediction.memory_bytes * each,
        "estimated_cycles": summary.cycles,  # by the compiler, without attention kernels
        "seconds": _seconds(prediction),
        "exposed_seconds": prediction.exposed_by_kind,
        "step_seconds": prediction.step,
        "tokens_per_second_per_chip": rate,
        "mfu_6n": (4 if config.lora.rank else 6)
        * parameter_count(model)
        * rate
        / (chip.peak_flops * each),
        "mfu_attention": each_token * rate / (chip.peak_flops * each),
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
    for name in ("parameters", "frozen", "moments", "gradients", "activations", "host"):
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
    if result["step_seconds"] is not None:
        lines.append(f"calibration  {result['calibration']['text']} (--calibration shows all)")
    return "\n".join(lines)


def _times(result: dict[str, Any]) -> list[str]:
    lines = [
        f"collectives  {one['count']:,} {kind}, {one['bytes'] / 1e9:.2f} GB a step"
        for kind, one in result["collectives_by_dtype"].items()
        if one["bytes"] >= 1e7
    ]
    exposed = ", ".join(
        f"{seconds:.3f} {kind}"
        for kind, seconds in result["exposed_seconds"].items()
        if seconds >= 5e-4
    )
    beside = sum(one["count"] for one in result["collectives_async"].values())
    waited = sum(one["count"] for one in result["collectives_sync"].values())
    if beside or waited:
        lines.append(
            f"network      {beside:,} collectives beside compute, {waited:,} on their own; seconds "
            f"waited for: {exposed or 'none'}"
        )
    parts = ", ".join(
        f"{name.replace('_', ' ')} {value:.3f}"
        for name, value in result["seconds"].items()
        if value is not None
    )
    rule = "4N" if result["config"]["lora"]["rank"] else "6N"  # a frozen weight has no gradient
    lines += [
        f"work         {result['flops_per_chip'] / 1e12:,.0f} TFLOP and "
        f"{result['hbm_bytes_per_chip'] / 1e9:,.0f} GB of memory traffic a chip and step",
        f"step         {result['step_seconds']:.3f} s predicted ({parts})",
        f"speed        {result['tokens_per_second_per_chip']:,.0f} tokens/s/chip, MFU "
        f"{result['mfu_6n']:.1%} ({rule}), {result['mfu_attention']:.1%} (with attention)",
    ]
    cost = "" if result["cost"] is None else f", {_short(result['cost'])} dollars"
    days = result["days"]
    long = f"{days:,.1f} days" if days >= 2 else f"{_short(24 * days)} hours"
    lines.append(f"run          {long}, {_short(result['chip_hours'])} chip hours{cost}")
    return lines


def _short(number: float) -> str:
    """With decimals where the number is small: fine-tuning takes hours, not years."""
    return f"{number:,.2f}" if number < 100 else f"{number:,.0f}"


def main() -> None:
    """The command; flags are defined below."""
    from llama_jax import search  # which compiles plans

    if _CALIBRATION.value:
        print(calibration.table())
        return
    config = cli.load_config(_CONFIG)
    if _TOPOLOGY.value is None:
        raise UserError("--topology is missing; try --topology=v5p-128 or --topology=h100:256x8")
    topology = parse_topology(_TOPOLOGY.value, _SLICES.value)
    if not 0 <= _PRICE.value < math.inf:
        raise UserError(f"--price must be a number of dollars, got {_PRICE.value}")
    tpu = topology.chip.name if topology.chip.torus else ""
    chosen = xla_flags.use_preset(_XLA_PRESET.value, tpu=tpu)
    jax.config.update("jax_platforms", "cpu")  # the compiler needs no device
    if _SEARCH.value:
        result = search.search(config, topology, _SEARCH_LIMIT.value, _PRICE.value)
    else:
        result = plan(config, topology, _PRICE.value)
        if not result["fits"]:
            result["would_fit"] = search.advice(config, topology, result)
    result["xla_preset"] = chosen.preset
    print(json.dumps(result) if _JSON.value else f"{table(result)}\nflags        {chosen}")


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
        "search",
        False,
        "Try mesh shapes, remat policies and microbatches, a line for each; show the fastest that "
        "fits. TPUs: up to the compiler's schedule (seconds each), the best two to the end.",
    )
    _SEARCH_LIMIT = flags.DEFINE_integer(
        "search_limit", 6, "Candidates that --search tries.", lower_bound=1
    )
    _XLA_PRESET = flags.DEFINE_string(
        "xla_preset", xla_flags.AUTO, f"{xla_flags.HELP} The chip is that of --topology."
    )
    _CALIBRATION = flags.DEFINE_bool(
        "calibration", False, "Print measured steps beside predicted ones, and end."
    )
    _JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
    cli.run(main, __doc__)
