"""Parameters and FLOPs of a model by arithmetic: nothing is allocated or compiled."""

import math

from llama_jax.config import NF4_BITS, LoraConfig, ModelConfig
from llama_jax.model.lora import matrix_shapes


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters, embeddings included, adapters not."""
    attention = model.dim * model.head_dim * 2 * (model.n_heads + model.n_kv_heads)
    block = attention + 3 * model.dim * model.ffn_dim + 2 * model.dim
    heads = 1 if model.tied_embeddings else 2
    return model.n_layers * block + heads * model.vocab_size * model.dim + model.dim


def adapter_count(model: ModelConfig, lora: LoraConfig) -> int:
    """Number of parameters of all adapters."""
    shapes = matrix_shapes(model)
    sides = sum(math.prod(side) for name in lora.names for side in shapes[name])
    return model.n_layers * lora.rank * sides


def frozen_bytes(model: ModelConfig, lora: LoraConfig) -> float:
    """Bytes of the base below adapters, with norms counted as if they were matrices."""
    shapes = matrix_shapes(model).values()
    weights = model.n_layers * sum(math.prod(inputs + outputs) for inputs, outputs in shapes)
    others = parameter_count(model) - weights
    each = {"float32": 4.0, "bfloat16": 2.0, "nf4": NF4_BITS / 8}[lora.base_dtype]
    return each * weights + max(2.0, each) * others


def flops_per_token(model: ModelConfig, lora: LoraConfig, seq_len: int) -> float:
    """FLOPs of one training token, forward and backward: the sum of `flops_by_part`."""
    return sum(flops_by_part(model, lora, seq_len).values())


def flops_by_part(model: ModelConfig, lora: LoraConfig, seq_len: int) -> dict[str, float]:
    """FLOPs of one training token: 6 per weight of a matrix product, plus causal attention.

    A weight that is frozen below adapters has no gradient, so its product counts 4. The embedding
    look-up multiplies nothing and is not counted, nor is recomputation.

    Args:
      model: the model.
      lora: the adapters; with rank 0, all weights are trained.
      seq_len: tokens of a sequence.
    """
    projections = model.dim * model.head_dim * 2 * (model.n_heads + model.n_kv_heads)
    scores = "attention scores"
    parts = {
        "attention projections": 6.0 * model.n_layers * projections,
        scores: attention_flops_per_token(model, seq_len),
        "MLP": 6.0 * model.n_layers * 3 * model.dim * model.ffn_dim,
        "output head": 6.0 * model.vocab_size * model.dim,
    }
    if not lora.rank:
        return parts
    frozen = {name: flops * 2 / 3 for name, flops in parts.items() if name != scores}
    return {**frozen, scores: parts[scores], "adapters": 6.0 * adapter_count(model, lora)}


def attention_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of one training token in attention scores and weighted values.

    12 L N H T as in PaLM (arXiv:2204.02311, appendix B), halved because the causal mask leaves half
    of it.
    """
    return 6.0 * model.n_layers * model.n_heads * model.head_dim * seq_len
