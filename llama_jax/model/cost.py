"""Counts of a model's parameters and FLOPs, by arithmetic: nothing is allocated or compiled."""

import math

from llama_jax.config import NF4_BITS, Config, LoraConfig, ModelConfig
from llama_jax.model.lora import frozen_dtype, is_quantized
from llama_jax.parameters import PARAMETERS, Parameter, Table, layer_matrices, present, shape_of


def parameter_count(model: ModelConfig, rows: Table = PARAMETERS) -> int:
    """Counts the parameters, with embeddings and without adapters."""
    return sum(math.prod(row.shape(model)) for row in present(model, rows))


def adapter_count(model: ModelConfig, lora: LoraConfig) -> int:
    """Counts the parameters of all adapters."""
    rows = layer_matrices()
    sides = (
        shape_of(side, model) for n in lora.names for side in (rows[n].inputs, rows[n].outputs)
    )
    return model.n_layers * lora.rank * sum(map(math.prod, sides))


def frozen_bytes(model: ModelConfig, lora: LoraConfig) -> float:
    """Counts the bytes of the frozen base of the adapters."""

    def each(row: Parameter) -> float:
        if is_quantized(row, lora):
            return NF4_BITS / 8
        return frozen_dtype(row, lora).itemsize

    return sum(each(row) * math.prod(row.shape(model)) for row in present(model))


# Names of the groups of matrices in the log; any other group keeps its own name.
_PARTS = {"attn": "attention projections", "mlp": "MLP"}


def flops_per_token(
    model: ModelConfig, lora: LoraConfig, seq_len: int, rows: Table = PARAMETERS
) -> float:
    """Counts the FLOPs of one training token, forward and backward: the sum of `flops_by_part`.

    Args:
      model: the model.
      lora: the adapters; with rank 0, all weights are trained.
      seq_len: tokens per sequence.
      rows: the table of the model.
    """
    return sum(flops_by_part(model, lora, seq_len, rows).values())


def flops_per_step(config: Config, rows: Table = PARAMETERS) -> float:
    """Counts the FLOPs of one step of a config without stages; see `flops_per_token`.

    Args:
      config: the config, or that of a stage.
      rows: the table of the model's parameters.
    """
    train = config.train
    each = flops_per_token(config.model, config.lora, train.seq_len, rows)
    return each * train.tokens_per_step


def flops_by_part(
    model: ModelConfig, lora: LoraConfig, seq_len: int, rows: Table = PARAMETERS
) -> dict[str, float]:
    """Counts the FLOPs of one training token by part of the model, forward and backward.

    A weight of a matrix product counts 6, or 4 if it is frozen, because then it has no gradient.
    Causal attention is added. The embedding look-up (which multiplies nothing) and recomputation
    are not counted.

    Args:
      model: the model.
      lora: the adapters; with rank 0, all weights are trained.
      seq_len: tokens per sequence.
      rows: the table of the model.
    """
    scores = "attention scores"
    parts: dict[str, float] = {}
    for row in layer_matrices(rows).values():
        name = _PARTS.get(row.group, row.group)
        parts[name] = parts.get(name, 0.0) + 6.0 * math.prod(row.shape(model))
        if row.group == "attn":  # listed behind their projections
            parts[scores] = attention_flops_per_token(model, seq_len)
    parts["output head"] = 6.0 * model.vocab_size * model.dim
    if not lora.rank:
        return parts
    frozen = {name: flops * 2 / 3 for name, flops in parts.items() if name != scores}
    return {**frozen, scores: parts[scores], "adapters": 6.0 * adapter_count(model, lora)}


def attention_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Counts the FLOPs of one training token in attention scores and weighted values.

    The count is 12 L N H T as in PaLM (arXiv:2204.02311, appendix B), halved because the causal
    mask hides half of the scores.
    """
    return 6.0 * model.n_layers * model.n_heads * model.head_dim * seq_len
