"""The plan of a run: its memory and collectives from the compiler, and the predicted time."""

import json
from typing import Any

from llama_jax.config import Config
from llama_jax.errors import UserError
from llama_jax.hardware.chips import GIB
from llama_jax.hardware.topology import Topology, topology_devices
from llama_jax.model.cost import flops_per_token, parameter_count
from llama_jax.parallel.mesh import DoesNotDivide
from llama_jax.plan import calibration
from llama_jax.plan.candidates import suggest_dividing_mesh
from llama_jax.plan.compilation import Compiled, compile_step, with_slices
from llama_jax.plan.hlo import Summary, parse, summarize
from llama_jax.plan.roofline import Prediction, predict_on

# Keys of a plan that only a compiled program has; null if it does not fit.
_OF_A_PROGRAM = (
    *("collectives", "collectives_by_dtype", "collectives_async", "collectives_sync"),
    *("lookup_collectives", "flops_per_chip", "hbm_bytes_per_chip", "estimated_cycles", "seconds"),
    *("exposed_seconds", "step_seconds", "tokens_per_second_per_chip", "mfu_6n", "mfu_attention"),
    *("days", "chip_hours", "cost"),
)


def plan(config: Config, topology: Topology, price: float = 0.0) -> dict[str, Any]:
    """Compiles `config` for a topology and reports memory, collectives and predicted times.

    Args:
      config: the run.
      topology: the machine.
      price: dollars for one chip for one hour; 0: unknown.

    Returns:
      The object that `--json` prints. Bytes are those of one chip; `total` is `arguments` (the
      donated state, and the batch) plus `temporaries`. Of the temporaries, `gradients` are as large
      as the parameters, and `activations` are the rest; with LoRA, `frozen` is the base. If the
      program does not fit, values that need a compiled program are null.

    Raises:
      UserError: see `topology_devices` and `compile_step`.
    """
    config = with_slices(config, topology.slices)
    compiled = _compile(config, topology)
    sizes = {name: size * topology.chip.devices_per_chip for name, size in compiled.bytes.items()}
    sizes["capacity"] = int(topology.chip.hbm_bytes) * topology.chip.devices_per_chip
    result: dict[str, Any] = {
        "config": json.loads(config.to_json()),
        "topology": str(topology),
        "mesh": dict(compiled.mesh.shape),
        "chips": topology.chips,
        "parameters": parameter_count(config.model),
        "bytes_per_chip": sizes,
        "fits": bool(compiled.text) and sizes["total"] <= sizes["capacity"],
        "sharding_constraints": compiled.constraints,
        "warnings": list(compiled.warnings),
        "compile_seconds": compiled.seconds,
        "calibration": calibration.summary(topology.chip.name),
    }
    if not compiled.text:
        return {**result, **dict.fromkeys(_OF_A_PROGRAM)}
    placed = list(compiled.mesh.devices.flat)
    prediction = predict_on(topology, placed, parse(compiled.text))
    result["warnings"] += _missing_flops(config, topology, prediction)
    return {
        **result,
        **_work(summarize(compiled.text), prediction, topology),
        **_speed(config, topology, prediction, price),
    }


def _compile(config: Config, topology: Topology) -> Compiled:
    devices = topology_devices(topology)
    try:
        return compile_step(config, devices)
    except DoesNotDivide as error:
        raise UserError(f"{error}; {suggest_dividing_mesh(config, topology)}") from error


def _missing_flops(config: Config, topology: Topology, prediction: Prediction) -> list[str]:
    """Returns a warning if the program seems to compute less than the model needs."""
    tokens = config.train.tokens_per_step / topology.devices
    each_token = flops_per_token(config.model, config.lora, config.train.seq_len)
    if prediction.flops >= each_token * tokens * 0.95:
        return []
    found = prediction.flops / tokens / each_token
    return [f"only {found:.0%} of the FLOPs are found in the program"]


def _work(summary: Summary, prediction: Prediction, topology: Topology) -> dict[str, Any]:
    """Reports what a step sends and computes, and the seconds of each part."""
    each = topology.chip.devices_per_chip
    return {
        "collectives": _counted(summary.collectives),
        "collectives_by_dtype": _counted(summary.by_dtype),
        "collectives_async": _counted(summary.asynchronous),
        "collectives_sync": _counted(summary.synchronous),
        "lookup_collectives": summary.lookup,
        "flops_per_chip": prediction.flops * each,
        "hbm_bytes_per_chip": prediction.memory_bytes * each,
        "estimated_cycles": summary.cycles,  # the compiler's, without attention kernels
        "seconds": _seconds(prediction),
        "exposed_seconds": prediction.exposed_by_kind,
    }


def _speed(
    config: Config, topology: Topology, prediction: Prediction, price: float
) -> dict[str, Any]:
    """Reports how fast a step is, and the time and cost of the whole run."""
    train = config.train
    rate = train.tokens_per_step / topology.chips / prediction.step
    peak = topology.chip.peak_flops * topology.chip.devices_per_chip
    days = train.steps * prediction.step / 86_400
    hours = days * 24 * topology.chips
    return {
        "step_seconds": prediction.step,
        "tokens_per_second_per_chip": rate,
        "mfu_6n": (4 if config.lora.rank else 6) * parameter_count(config.model) * rate / peak,
        "mfu_attention": flops_per_token(config.model, config.lora, train.seq_len) * rate / peak,
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


def stage_to_plan(config: Config, step: int | None) -> tuple[Config, str]:
    """Returns the config of one stage of a run, and its description; "" without stages.

    Args:
      config: the config of the run.
      step: a step of the stage, counted from 1; None: the last step of the run.
    """
    if not config.train.stages:
        return config, ""
    steps = config.train.steps
    last = min(step or steps, steps) - 1
    stage = config.stage_at(last)
    which = f"steps {stage.start + 1:,} to {min(stage.stop, steps):,} of the run"
    return stage.config, f"{which}; days and cost are as if all {steps:,} steps were like these"


def table(result: dict[str, Any]) -> str:
    """Formats a plan for people."""
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
            f"network      {beside:,} collectives overlap compute, {waited:,} do not; seconds "
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
    """Formats a number, with decimals if it is small: fine-tuning takes hours, not years."""
    return f"{number:,.2f}" if number < 100 else f"{number:,.0f}"
