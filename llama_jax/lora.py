"""Adapters of low rank (LoRA, arXiv:2106.09685): a small second tree beside a frozen base.

`layers/attn/wq` of the base, L D N H, has `layers/attn/wq/a`, L D r, and `layers/attn/wq/b`,
L r N H; the weight in effect is W + alpha / rank A B.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llama_jax.lora_config import MATRICES, NF4_BITS, LoraConfig
from llama_jax.model_config import ModelConfig


@struct.dataclass
class Adapted:
    """A base with adapters: what `model.forward` takes in place of plain parameters.

    Attributes:
      base: parameters, in the form of `frozen`.
      adapters: see `init_adapters`.
      lora: what the adapters were made by.
    """

    base: Any
    adapters: Any
    lora: LoraConfig = struct.field(pytree_node=False)


def matrix_shapes(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Inputs and outputs of the matrices of a layer."""
    heads, kv_heads = (model.n_heads, model.head_dim), (model.n_kv_heads, model.head_dim)
    dim, ffn = (model.dim,), (model.ffn_dim,)
    return {
        "wq": (dim, heads),
        "wk": (dim, kv_heads),
        "wv": (dim, kv_heads),
        "wo": (heads, dim),
        "w1": (dim, ffn),
        "w2": (ffn, dim),
        "w3": (dim, ffn),
    }


def adapter_count(model: ModelConfig, lora: LoraConfig) -> int:
    """Number of trained parameters."""
    shapes = matrix_shapes(model)
    sides = sum(math.prod(side) for name in lora.names for side in shapes[name])
    return model.n_layers * lora.rank * sides


def frozen_bytes(model: ModelConfig, lora: LoraConfig) -> float:
    """Of the base below adapters, up to the norms, which are counted as if they were matrices."""
    shapes = matrix_shapes(model).values()
    weights = model.n_layers * sum(math.prod(inputs + outputs) for inputs, outputs in shapes)
    others = model.parameter_count() - weights
    each = {"float32": 4.0, "bfloat16": 2.0, "nf4": NF4_BITS / 8}[lora.base_dtype]
    return each * weights + max(2.0, each) * others


def flops_by_part(model: ModelConfig, lora: LoraConfig, seq_len: int) -> dict[str, float]:
    """FLOPs of one training token: `ModelConfig.flops_by_part`, but 4 per weight that is frozen."""
    parts = model.flops_by_part(seq_len)
    if not lora.rank:
        return parts
    scores = "attention scores"
    frozen = {name: flops * 2 / 3 for name, flops in parts.items() if name != scores}
    return {**frozen, scores: parts[scores], "adapters": 6.0 * adapter_count(model, lora)}


def flops_per_token(model: ModelConfig, lora: LoraConfig, seq_len: int) -> float:
    """FLOPs of one training token: the sum of `flops_by_part`."""
    return sum(flops_by_part(model, lora, seq_len).values())


def init_adapters(model: ModelConfig, lora: LoraConfig, key: jax.Array) -> dict[str, Any]:
    """Adapters before the first step, float32: A as PEFT draws it, B zero, so that nothing changes.

    That is uniform within 1 / sqrt(inputs) (torch's Kaiming uniform with a = sqrt(5)); here made of
    integers times one constant, so that it is the same bits on every mesh (see `model.normal`).
    """
    layers: dict[str, Any] = {}
    for name, (inputs, outputs) in matrix_shapes(model).items():
        if name not in lora.names:
            continue
        matrix_key = jax.random.fold_in(key, list(MATRICES).index(name))
        words = jax.random.bits(matrix_key, (model.n_layers, *inputs, lora.rank), jnp.uint32)
        centred = (words >> 8).astype(jnp.int32) - 2**23  # 24 bits, exact in float32
        a = centred.astype(jnp.float32) * (2**-23 / math.sqrt(math.prod(inputs)))
        b = jnp.zeros((model.n_layers, lora.rank, *outputs), jnp.float32)
        layers.setdefault(MATRICES[name], {})[name] = {"a": a, "b": b}
    return {"layers": layers}


def adapter_of(adapters: Any, path: Iterable[str]) -> Any:
    """The adapter of the array at a path, such as layers, attn, wq; None if it has none."""
    found = adapters
    for key in path:
        found = found.get(key)
        if found is None:
            return None
    return found


def delta(adapter: Any, lora: LoraConfig, stacked: bool = True) -> Any:
    """What an adapter adds to its matrix, in the matrix's shape; of NumPy or JAX arrays."""
    a, b = adapter["a"], adapter["b"]
    first = 1 if stacked else 0
    product = a.reshape(*a.shape[:first], -1, lora.rank) @ b.reshape(
        *b.shape[:first], lora.rank, -1
    )
    return lora.scale * product.reshape(*a.shape[:-1], *b.shape[first + 1 :])


def merge(base: Any, adapters: Any, lora: LoraConfig, sign: int = 1) -> Any:
    """The base with its adapters added to it: plain parameters, which need no adapters any more."""

    def add(path: tuple[Any, ...], w: jax.Array) -> jax.Array:
        adapter = adapter_of(adapters, (key.key for key in path))
        if adapter is None:
            return w
        return (w + sign * delta(adapter, lora)).astype(w.dtype)

    return jax.tree.map_with_path(add, base)


def unmerge(merged: Any, adapters: Any, lora: LoraConfig) -> Any:
    """The inverse of `merge`, up to rounding."""
    return merge(merged, adapters, lora, sign=-1)
