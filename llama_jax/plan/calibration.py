"""Comparisons of predictions with measured steps, published or our own.

A row of `RUNS` compares `predict` with a measured step of the same program, compiled without its
hardware; programs of other projects are compiled from their public source. A row of `SHAPES`
compares this project's program with the published rate of another one for the same model, batch and
remat policy. It contains both the predictor's error and the difference between the programs, and so
does not count in the uncertainty.
"""

import dataclasses
from typing import Any

MAXTEXT = "MaxText"
OURS = "llama_jax"


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    """A measured step and its prediction.

    Attributes:
      chip: name of the chip in `chips`.
      model: the model, and the number of chips.
      details: batch per chip, remat policy, flags.
      program: the project whose program is predicted.
      measured: measured seconds of a step.
      predicted: predicted seconds of a step of `program`.
      source: where the measurement is published.
      note: remarks for readers; may be empty.
    """

    chip: str
    model: str
    details: str
    program: str
    measured: float
    predicted: float
    source: str
    note: str = ""

    @property
    def error(self) -> float:
        """The relative error of the prediction; positive if it is above the measurement."""
        return self.predicted / self.measured - 1


_TIERING = "MaxText docs/reference/models/tiering.md, benchmarks/ at 92e59fd"
_H200 = "benchmarks/README.md, one H200"
_SHORT = "8 layers, 8 x 2048 tokens, save:q,k,v,attn_context,mlp_gate,mlp_up"


def _on_h200(
    model: str, details: str, measured: float, predicted: float, note: str = ""
) -> MeasuredRun:
    return MeasuredRun("h200", f"{model}, 1 chip", details, OURS, measured, predicted, _H200, note)


# 692 and 905 are published tokens/s/chip, with 4 sequences of 4,096 tokens per chip.
RUNS = (
    MeasuredRun(
        chip="v5p",
        model="Llama 2 70B, 512 chips",
        details="4 x 4096 tokens a chip, save_dot_except_mlpwi",
        program=MAXTEXT,
        measured=4 * 4096 / 692,
        predicted=25.06,
        source=_TIERING,
        note="program compiled at e591f30 with JAX 0.10.0",
    ),
    MeasuredRun(
        chip="v6e",
        model="Llama 2 70B, 256 chips",
        details="4 x 4096 tokens a chip, full remat",
        program=MAXTEXT,
        measured=4 * 4096 / 905,
        predicted=17.28,
        source=_TIERING,
        note="attention_efficiency 0.25 was chosen with this run in view; at 0.5 it is 16.23 s",
    ),
    _on_h200(
        "LLaMA 7B",
        _SHORT,
        *(0.3355, 0.322),
        note="the efficiencies of Hopper were fitted to this run",
    ),
    _on_h200("LLaMA 7B", f"{_SHORT}, attention=xla", 0.402, 0.391),
    _on_h200(
        "LLaMA 7B",
        "32 layers, 8 x 2048 tokens, save:q,k,v,attn_context",
        *(1.425, 1.347),
        note="measured with --xla_gpu_enable_triton_gemm=false, predicted without that flag",
    ),
    _on_h200("Llama 3.2 1B", "4 x 8192 tokens", 0.698, 0.682),
    _on_h200(
        "LLaMA 7B, QLoRA",
        "configs/guanaco_7b_qlora.py",
        *(0.770, 0.594),
        note="the prediction ignores the time to dequantise NF4",
    ),
)
SHAPES = (
    MeasuredRun(
        chip="v5p",
        model="Llama 2 70B, 512 chips",
        details="4 x 4096 tokens a chip, save:q,k,v,attn_out",
        program=OURS,
        measured=4 * 4096 / 692,
        predicted=23.37,
        source=_TIERING,
        note="the published run (save_dot_except_mlpwi) also keeps the MLP's output",
    ),
    MeasuredRun(
        chip="v6e",
        model="Llama 2 70B, 256 chips",
        details="4 x 4096 tokens a chip, full remat",
        program=OURS,
        measured=4 * 4096 / 905,
        predicted=14.61,
        source=_TIERING,
        note="the published run waits for the all-reduces of all gradients",
    ),
    MeasuredRun(
        chip="v5p",
        model="Llama 3.1 405B, 512 chips",
        details="2 x 8192 tokens a chip, full remat",
        program=OURS,
        measured=131.474,
        predicted=136.76,
        source="AI-Hypercomputer tpu-recipes training/v5p/Llama3.1-405B-MaxText",
        note="the published run keeps more tensors, in the host's memory",
    ),
    MeasuredRun(
        chip="v6e",
        model="Llama 3.1 70B, 256 chips",
        details="4 x 8192 tokens a chip, offload:block_in,q,k,v",
        program=OURS,
        measured=4 * 8192 / 960,
        predicted=32.2,
        source=_TIERING,
        note="both with the flags of --xla_preset=v6e-offload",
    ),
)


def runs_of(chip: str) -> list[MeasuredRun]:
    """Returns the runs that give the uncertainty for a chip, or for one with the same unit."""
    return [run for run in RUNS if run.chip == _UNIT.get(chip, chip)]


_UNIT = {"h100": "h200"}  # the same matrix unit


def uncertainty(chip: str) -> str:
    """Describes in one line how far predictions for a chip were off."""
    runs = runs_of(chip)
    if not runs:
        return f"{chip}: no prediction has been compared with a run"
    errors = sorted(run.error for run in runs)
    side = "above" if errors[-1] > 0 else "below"
    sizes = sorted(abs(error) for error in errors)
    spread = f"{sizes[0]:.1%}" if len(runs) == 1 else f"{sizes[0]:.1%} to {sizes[-1]:.1%}"
    ours = all(run.program == OURS for run in runs)
    which = "one published run" if len(runs) == 1 else f"{len(runs)} runs"
    who = f"of {runs[0].program}" if len({run.program for run in runs}) == 1 else "of others"
    where = "" if runs[0].chip == chip else f" on an {runs[0].chip}, which has the same unit"
    tail = "" if ours else "; no run of this code yet"
    if errors[0] < 0 < errors[-1]:
        spread, side = f"{errors[0]:+.1%} to {errors[-1]:+.1%}", "off"
    return f"{chip}: predicted times were {spread} {side} {which} {who}{where}{tail}"


def summary(chip: str) -> dict[str, Any]:
    """Returns the object that `plan --json` has for the calibration of a chip."""
    runs = [{**dataclasses.asdict(run), "error": run.error} for run in runs_of(chip)]
    return {"text": uncertainty(chip), "runs": runs}


def table() -> str:
    """Formats all rows for people."""
    lines = ["measured and predicted seconds of a step of the same program:", *_rows(RUNS)]
    lines += ["", "published steps of others, and predictions for this code at the same shape:"]
    lines += _rows(SHAPES)
    return "\n".join(lines)


def _rows(runs: tuple[MeasuredRun, ...]) -> list[str]:
    lines = []
    for run in runs:
        lines.append(
            f"  {run.chip:<6} {run.measured:8.3f} {run.predicted:8.3f} {run.error:+7.1%}  "
            f"{run.model}, {run.details} ({run.program}; {run.source})"
        )
        lines += [f"{'':34}{run.note}"] if run.note else []
    return lines
