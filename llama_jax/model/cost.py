"""Counts of a model's parameters and FLOPs, by arithmetic: nothing is allocated or compiled."""

import math

from llama_jax.config import NF4_BITS, LoraConfig, ModelConfig
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


def flops_per_token(model: ModelConfig, lora: LoraConfig, seq_len: int) -> float:
    """Counts the FLOPs of one training token, forward and backward: the sum of `flops_by_part`.

    Args:
      model: the model.
      lora: the adapters; with rank 0, all weights are trained.
      seq_len: tokens per sequence.
    """
    return sum(flops_by_part(model, lora, seq_len).values())


def flops_by_part(model: ModelConfig, lora: LoraConfig, seq_len: int) -> dict[str, float]:
    """Counts the FLOPs of one training token by part of the model, forward and backward.

    A weight of a matrix product counts 6, or 4 if it is frozen, because then it has no gradient.
    Causal attention is added. The embedding look-up (which multiplies nothing) and recomputation
    are not counted.

    Args:
      model: the model.
      lora: the adapters; with rank 0, all weights are trained.
      seq_len: tokens per sequence.
    """
    scores = "attention scores"
    weights = {row.group: 0 for row in layer_matrices().values()}
    for row in layer_matrices().values():
        weights[row.group] += math.prod(row.shape(model))
    parts = {
        "attention projections": 6.0 * weights["attn"],
        scores: attention_flops_per_token(model, seq_len),
        "MLP": 6.0 * weights["mlp"],
        "output head": 6.0 * model.vocab_size * model.dim,
    }
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
