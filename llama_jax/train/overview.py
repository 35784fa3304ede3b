"""The text that a run prints before it begins."""

import math

import jax

from llama_jax.config import Config, OptimConfig
from llama_jax.data.shards import layout
from llama_jax.data.training_data import TrainingData
from llama_jax.interchange.formats import Source
from llama_jax.model.cost import adapter_count, flops_by_part, flops_per_step, parameter_count
from llama_jax.parameters import Table
from llama_jax.train.parts import LLAMA_PARTS, Parts


def overview(
    config: Config, mesh: jax.sharding.Mesh, data: TrainingData, parts: Parts = LLAMA_PARTS
) -> str:
    """Describes the run and all derived quantities, in a few lines.

    Args:
      config: the config of the run.
      mesh: the devices.
      data: the data of the run.
      parts: the parts of the training, see `Parts`.
    """
    train, rows = config.train, parts.architecture.parameters
    tokens = config.total(lambda one: one.train.tokens_per_step, train.steps)
    flops = config.total(lambda one: flops_per_step(one, rows), train.steps)
    shape = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return "\n".join(
        (
            f"model   {parameter_count(config.model, rows):,} parameters, "
            f"{config.model.compute_dtype}",
            *(f"parts   {kind}: {name}" for kind, name in parts.names().items()),
            *_describe_start(config),
            f"mesh    {shape} on {mesh.size} {mesh.devices.flat[0].device_kind} device(s), "
            f"{jax.process_count()} process(es)",
            f"batch   {train.global_batch} sequences x {train.seq_len} = "
            f"{train.tokens_per_step:,} tokens, in {train.grad_accum} microbatch(es)",
            f"run     {train.steps:,} steps = {tokens:,} tokens, {flops:.2e} FLOPs",
            *_describe_rate(config.optim, train.steps, parts),
            *_describe_stages(config),
            *_describe_flops(config, rows),
            *data.train.summary(train.steps),
        )
    )


def remarks(config: Config, data: TrainingData, weights: Source | None) -> list[str]:
    """Lists remarks on the vocabulary and the data: padding, answers without an end token.

    Args:
      config: the config of the run.
      data: the data of the run.
      weights: the weights that the run reads, as `start.open_weights` returns them, or None.
    """
    rows, ids = config.model.vocab_size, data.tokenizer.vocab_size if data.tokenizer else 0
    found = []
    if 0 < ids < rows:
        found.append(
            f"vocab   {ids:,} ids, {rows:,} rows: {rows - ids:,} are padding and never sampled"
        )
    known = weights.description.config.model.vocab_size if weights is not None else rows
    if config.lora.rank and ids > known:
        found.append(
            f"warning {config.init_from} has no rows for the last {ids - known:,} ids, and "
            "adapters do not train the added rows: the model cannot learn these tokens; "
            "train all weights (lora.rank=0), or use the tokenizer of the base"
        )
    answers, unended = data.answers
    if unended:
        found.append(
            f"warning {unended:,} of {answers:,} answers do not end in an end token, so the model "
            f"does not learn to stop there: the chat template {config.data.template} trains no "
            "token that ends them; let it write eos_token, or another special token of the "
            "tokenizer, at the end of the answer (inside {% generation %}), and prepare the data "
            "again"
        )
    return found


def no_evaluation(data: TrainingData) -> list[str]:
    """Lists the data that the run is not evaluated on, and why."""
    reasons = "; ".join(f"{name}: {why}" if name else why for name, why in data.unvalidated.items())
    if data.validation is None:
        return [
            f"eval    none, because there is no validation data{f' ({reasons})' * bool(reasons)}: "
            "eval_loss is not logged, and train.keep_best has no losses to compare"
        ]
    return [f"eval    without some sources ({reasons})"] if reasons else []


def unchecked(data: TrainingData) -> list[str]:
    """Returns a warning if the run cannot detect damage in some of the shards."""
    if not data.unchecked:
        return []
    return [f"warning {layout.unchecked_remark(data.unchecked)}"]


def _describe_stages(config: Config) -> list[str]:
    """Returns a line for each stage of the run; empty without stages."""
    lines, last = [], config.train.steps
    for stage in config.stages if config.train.stages else ():
        if stage.start >= last:
            lines.append(f"from step {stage.start + 1:,} on: after the end of the run")
            break
        values = " ".join(f"{name}={value}" for name, value in stage.values.items())
        steps = f"steps {stage.start + 1:,} to {min(stage.stop, last):,}"
        lines.append(f"{steps}: {values or 'as above'}")
    return [f"{' ' * 8 if number else 'stages  '}{line}" for number, line in enumerate(lines)]


def _describe_start(config: Config) -> list[str]:
    """Returns the lines on the initial weights and the adapters; empty for random weights."""
    lora = config.lora
    if not lora.rank:
        place = f"step of {config.branch_from}" if config.branch_from else config.init_from
        return [f"begin   {place}"] if place else []
    return [
        f"LoRA    {adapter_count(config.model, lora):,} parameters are trained: rank {lora.rank} "
        f"for {lora.targets}",
        f"base    {config.init_from}, frozen in {lora.base_dtype}",
    ]


def _describe_rate(optim: OptimConfig, steps: int, parts: Parts) -> list[str]:
    """Returns the line on the learning rate; none if the optimiser has its own."""
    if not parts.follows_schedule:
        return []
    warmup, final = optim.warmup_steps, optim.peak_lr * optim.final_lr_fraction
    if optim.schedule == "constant":
        after = "constant"
    elif optim.schedule == "wsd":
        length = optim.decay_length(steps)
        after = f"wsd: {optim.decay_shape} to {final:.2e} over the last {length:,} steps"
    else:
        if optim.schedule == "inverse_sqrt":
            final = optim.peak_lr * math.sqrt(max(warmup, 1) / steps)
        after = f"{optim.schedule} to {final:.2e} at step {steps:,}"
    begin = f"after {warmup:,} steps" if warmup else "from the first step"
    return [f"rate    {optim.peak_lr:.2e} {begin}, then {after}"]


def _describe_flops(config: Config, table: Table) -> list[str]:
    """Returns the lines of a table of the FLOPs of a step."""
    tokens = config.train.tokens_per_step
    parts = flops_by_part(config.model, config.lora, config.train.seq_len, table)
    total = sum(parts.values())
    rows = [
        f"{name:<23}{flops:>9.2e}{flops * tokens:>11.2e}{flops / total:>9.1%}"
        for name, flops in (*parts.items(), ("total", total))
    ]
    frozen = ", 4 per frozen one" if config.lora.rank else ""
    rule = f"(6 per weight of a matrix product{frozen}; attention's causal half; "
    rule += "recomputation not counted)"
    head = f"FLOPs   {'':<23}{'a token':>9}{'a step':>11}{'share':>9}"
    return [head, *(" " * 8 + row for row in (*rows, rule))]
