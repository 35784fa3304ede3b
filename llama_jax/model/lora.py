"""Adapters of low rank (LoRA, arXiv:2106.09685): a small second tree beside a frozen base.

`layers/attn/wq` of the base, L D N H, has `layers/attn/wq/a`, L D r, and `layers/attn/wq/b`,
L r N H; the weight in effect is W + alpha / rank A B.

The base is kept in a form that is smaller than the weights that are trained. Matrices are in
`lora.base_dtype`. NF4 is for those of the layers; embedding and output matrix are then bfloat16, as
in QLoRA. The scales of norms stay float32: they are small, and used in float32.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct

from llama_jax.config import MATRICES, LoraConfig, ModelConfig
from llama_jax.model import nf4
from llama_jax.model.initializers import uniform


@struct.dataclass
class Adapted:
    """A base with adapters: what `llama.forward` takes in place of plain parameters.

    Attributes:
      base: parameters, in the form of `to_frozen`.
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


def init_adapters(model: ModelConfig, lora: LoraConfig, key: jax.Array) -> dict[str, Any]:
    """Adapters before the first step, float32: A as PEFT draws it, B zero, so that nothing changes.

    That is uniform within 1 / sqrt(inputs) (torch's Kaiming uniform with a = sqrt(5)).
    """
    layers: dict[str, Any] = {}
    for name, (inputs, outputs) in matrix_shapes(model).items():
        if name not in lora.names:
            continue
        matrix_key = jax.random.fold_in(key, list(MATRICES).index(name))
        draw = uniform(1 / math.sqrt(math.prod(inputs)))
        a = draw(matrix_key, (model.n_layers, *inputs, lora.rank))
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


def merge(base: Any, adapters: Any, lora: LoraConfig) -> Any:
    """The base with its adapters added to it: plain parameters, which need no adapters any more."""

    def add(path: tuple[Any, ...], w: jax.Array) -> jax.Array:
        adapter = adapter_of(adapters, (key.key for key in path))
        if adapter is None:
            return w
        return (w + delta(adapter, lora)).astype(w.dtype)

    return jax.tree.map_with_path(add, base)


def n_inputs(path: str) -> int:
    """How many axes of a matrix of one layer are inputs: heads and head size are two."""
    return 2 if path.endswith("/wo") else 1


def is_quantized(path: str, lora: LoraConfig) -> bool:
    """Whether an array of the base, such as `layers/attn/wq`, is in NF4."""
    return lora.base_dtype == "nf4" and path.rpartition("/")[2] in MATRICES


def frozen_dtype(path: str, lora: LoraConfig) -> Any:
    """The dtype of an array that is not in NF4."""
    whole = lora.base_dtype == "float32" or path.endswith("norm")
    return np.dtype(np.float32 if whole else ml_dtypes.bfloat16)


def to_frozen(path: str, array: np.ndarray, lora: LoraConfig) -> Any:
    """An array of the base, of one layer where it is stacked, as it is kept."""
    if is_quantized(path, lora):
        return nf4.quantize(array, n_inputs(path))
    return np.ascontiguousarray(array).astype(frozen_dtype(path, lora))


def to_float32(frozen: Any) -> np.ndarray:
    """The float32 numbers that `to_frozen` kept."""
    if isinstance(frozen, nf4.NF4):
        return np.asarray(nf4.dequantize(jax.tree.map(jnp.asarray, frozen), jnp.float32))
    return frozen.astype(np.float32)


def abstract_base(params: Any, lora: LoraConfig) -> Any:
    """Shapes and dtypes of the base, for abstract parameters."""

    def leaf(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if is_quantized(name, lora):
            return nf4.abstract(x.shape[1:], n_inputs(name), x.shape[0])
        return jax.ShapeDtypeStruct(x.shape, frozen_dtype(name, lora))

    return jax.tree.map_with_path(leaf, params)
