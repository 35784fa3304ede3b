"""What is about to be trained, in a few lines."""

import jax

from llama_jax.config import Config
from llama_jax.data.pipeline import TrainingData


def describe(config: Config, mesh: jax.sharding.Mesh, data: TrainingData) -> str:
    """The run, with every derived quantity."""
    train = config.train
    tokens = train.steps * train.tokens_per_step
    shape = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return "\n".join(
        (
            f"model   {config.model.parameter_count():,} parameters, {config.model.compute_dtype}",
            f"mesh    {shape} on {mesh.size} {mesh.devices.flat[0].device_kind} device(s), "
            f"{jax.process_count()} process(es)",
            f"batch   {train.global_batch} sequences x {train.seq_len} = "
            f"{train.tokens_per_step:,} tokens, in {train.grad_accum} microbatch(es)",
            f"run     {train.steps:,} steps = {tokens:,} tokens, "
            f"{config.model.flops_per_token(train.seq_len) * tokens:.2e} FLOPs",
            *_describe_flops(config),
            *_describe_data(config, data),
        )
    )


def _describe_flops(config: Config) -> list[str]:
    """A table of where the FLOPs of a step go."""
    tokens = config.train.tokens_per_step
    parts = config.model.flops_by_part(config.train.seq_len)
    total = sum(parts.values())
    rows = [
        f"{name:<23}{flops:>9.2e}{flops * tokens:>11.2e}{flops / total:>9.1%}"
        for name, flops in (*parts.items(), ("total", total))
    ]
    rule = "(6 per weight of a matrix product; attention's causal half; recomputation not counted)"
    head = f"FLOPs   {'':<23}{'a token':>9}{'a step':>11}{'share':>9}"
    return [head, *(" " * 8 + row for row in (*rows, rule))]


def _describe_data(config: Config, data: TrainingData) -> list[str]:
    """How often each source will have been seen at the end."""
    epochs = data.train.epochs(config.train.steps)
    if not epochs:
        return []
    seen = ", ".join(f"{name or 'the source'} {value:.2f}" for name, value in epochs.items())
    return [f"data    epochs at the end: {seen}"]
