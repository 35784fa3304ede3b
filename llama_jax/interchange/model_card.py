"""The model card of an export: the model, its training, and the results."""

import functools
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from llama_jax.checkpoint import saved_step
from llama_jax.errors import UserError
from llama_jax.files import number, read_jsonl
from llama_jax.model.cost import flops_per_step, parameter_count

_TRAINING = "## Training\n\n"


def of_average(card: str, steps: Sequence[int]) -> str:
    """Returns the card of the newest step, changed to that of the average of several steps.

    Args:
      card: the result of `render` for the newest step.
      steps: the steps, in ascending order.
    """
    line = (
        f"The weights are the average of steps {', '.join(map(str, steps))}. The table describes "
        f"the training up to step {steps[-1]}; its losses are not those of the average."
    )
    return card.replace(_TRAINING, f"{_TRAINING}{line}\n\n", 1)


def render(meta: saved_step.StepMeta, step_folder: epath.Path) -> str:
    """Returns a README.md for the weights of one step.

    Losses, speed and chip-hours come from `metrics.jsonl` in the work directory, if it still
    exists.
    """
    config, model = meta.config, meta.of_weights.model
    rows = {
        "parameters": f"{parameter_count(model):,}",
        "dim, layers": f"{model.dim}, {model.n_layers}",
        "heads, kv heads": f"{model.n_heads}, {model.n_kv_heads} of size {model.head_dim}",
        "ffn": f"{model.ffn_dim}",
        "vocabulary": f"{model.vocab_size:,}" + (", tied" if model.tied_embeddings else ""),
        "context": f"{meta.context:,} tokens",
        "RoPE theta": f"{model.rope_theta:,.0f}",
    }
    if model.rope_is_stretched:
        rows["RoPE scaling"] = f"{model.rope_scaling_factor:g} ({model.rope_scaling})"
    if model.sliding_window:
        rows["sliding window"] = f"{model.sliding_window:,} tokens"
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""),
        *("# A LLaMA trained with llama_jax", "", "## Model", "", *_table(rows), "", "## Training"),
        "",
    ]
    if meta.step == 0:
        lines.append("No training here: the weights were imported, or are the initial ones.")
    else:
        lines += _table(_training(meta, step_folder.parent.parent / "metrics.jsonl"))
    text = config.to_json().rstrip()
    return "\n".join([*lines, "", "## Config", "", "```json", text, "```", ""])


def _training(meta: saved_step.StepMeta, metrics: epath.Path) -> dict[str, str]:
    config, step = meta.config, meta.step
    last_step = meta.of_weights
    train, optim = last_step.train, last_step.optim
    tokens = config.total(lambda one: one.train.tokens_per_step, step)
    flops = config.total(flops_per_step, step)
    rows = {
        "steps": f"{step:,} of {config.train.steps:,}",
        "tokens seen": f"{tokens:,} ({train.global_batch:,} x {train.seq_len:,} a step)",
        "data": config.data.source,
        "mixture": last_step.data.mixture or "by size",
        "optimiser": f"AdamW, peak {optim.peak_lr:g}, {optim.warmup_steps:,} warm-up steps, "
        f"{optim.schedule}",
        "compute": f"{flops:.2e} FLOPs (6 per weight, and causal attention)",
    }
    try:
        last, damaged = _last_values(metrics, step)
    except UserError as error:
        _warn_once(f"the model card has no losses: {error}")
        return rows
    if damaged:
        rows["left out below"] = f"{damaged} damaged line(s) of metrics.jsonl"
    for name, title in (("loss", "training loss"), ("eval_loss", "validation loss")):
        if name in last:
            rows[title] = f"{last[name]:.4f} nats per token"
    if last.get("speed"):
        rows["speed"] = f"{last['speed']:,.0f} tokens/s (median)"
    if last.get("chip_seconds"):
        kind = f" of {meta.device_kind}" if meta.device_kind else ""
        rows["chip-hours"] = (
            f"{last['chip_seconds'] / 3600:,.2f}{kind}, "
            "with evaluation, saving, and steps that were repeated after an interruption"
        )
    return rows


@functools.cache  # an export may describe its step several times
def _warn_once(text: str) -> None:
    """Prints a warning to stderr, once for each text."""
    print(f"warning: {text}", file=sys.stderr)


def _last_values(metrics: epath.Path, step: int) -> tuple[dict[str, Any], int]:
    """Returns values of the log up to a step, and the number of damaged lines, which are left out.

    The values are the newest loss and eval_loss, the median of tokens/s, and the sum of
    chip-seconds.

    Raises:
      UserError: the log cannot be read.
    """
    found: dict[str, Any] = {}
    rates = []
    chip_seconds = 0.0
    if not metrics.exists():
        return found, 0
    records, damaged = read_jsonl(metrics)
    for record in records:
        if record["step"] > step:
            continue
        losses = {name: number(record, name) for name in ("loss", "eval_loss")}
        found |= {name: loss for name, loss in losses.items() if loss is not None}
        if rate := number(record, "tokens_per_second"):
            rates.append(rate)
        chip_seconds += number(record, "chip_seconds") or 0.0
    found["speed"] = statistics.median(rates) if rates else None
    return {**found, "chip_seconds": chip_seconds}, damaged


def _table(rows: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
