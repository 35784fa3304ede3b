"""Low-rank adapters (LoRA, arXiv:2106.09685): a second, small tree of parameters on a frozen base.

For example, the matrix `layers/attn/wq` of the base, L D N H, has the adapter `layers/attn/wq/a`,
L D r, and `layers/attn/wq/b`, L r N H. The effective weight is W + (alpha / rank) A B.

The base is usually stored in a smaller form than trained weights: its matrices have the dtype
`lora.base_dtype`. Only the matrices of the layers can be NF4; then the embedding and output
matrices are bfloat16, as in QLoRA. The scales of norms stay float32: they are small, and the model
uses them in float32.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct, traverse_util

from llama_jax.config import LoraConfig, ModelConfig
from llama_jax.model import nf4
from llama_jax.model.initializers import uniform
from llama_jax.parameters import PARAMETERS, Parameter, Table, layer_matrices, path_of, shape_of


@struct.dataclass
class Adapted:
    """A base with adapters, which `llama.forward` accepts in place of plain parameters.

    Attributes:
      base: parameters, in the form of `to_frozen`.
      adapters: see `init_adapters`.
      lora: the config of the adapters.
    """

    base: Any
    adapters: Any
    lora: LoraConfig = struct.field(pytree_node=False)


def init_adapters(
    model: ModelConfig, lora: LoraConfig, key: jax.Array, rows: Table = PARAMETERS
) -> dict[str, Any]:
    """Makes the initial adapters, float32: A is random, and B is 0, so that they have no effect.

    A has the distribution that PEFT uses: uniform from -1 / sqrt(inputs) to 1 / sqrt(inputs), which
    is torch's Kaiming uniform with a = sqrt(5).

    Args:
      model: config of the base.
      lora: the rank, and the matrices that get an adapter.
      key: the key of the random numbers.
      rows: the model's table of parameters.
    """
    pairs = {}
    for number, (name, row) in enumerate(layer_matrices(rows).items()):
        if name not in lora.names:
            continue
        inputs, outputs = shape_of(row.inputs, model), shape_of(row.outputs, model)
        draw = uniform(1 / math.sqrt(math.prod(inputs)))
        a = draw(jax.random.fold_in(key, number), (model.n_layers, *inputs, lora.rank))
        b = jnp.zeros((model.n_layers, lora.rank, *outputs), jnp.float32)
        pairs[row.path] = {"a": a, "b": b}
    return traverse_util.unflatten_dict(pairs, sep="/")


def adapter_of(adapters: Any, path: str) -> Any:
    """Returns the adapter of the array at a path, such as `layers/attn/wq`, or None."""
    for key in path.split("/"):
        if key not in adapters:
            return None
        adapters = adapters[key]
    return adapters


def delta(adapter: Any, lora: LoraConfig, stacked: bool = True) -> Any:
    """Computes the change that an adapter makes to its matrix, in the shape of the matrix.

    Args:
      adapter: its arrays `a` and `b`, of NumPy or JAX.
      lora: the config of the adapter.
      stacked: whether the arrays have a leading axis L.
    """
    a, b = adapter["a"], adapter["b"]
    first = 1 if stacked else 0
    product = a.reshape(*a.shape[:first], -1, lora.rank) @ b.reshape(
        *b.shape[:first], lora.rank, -1
    )
    return lora.scale * product.reshape(*a.shape[:-1], *b.shape[first + 1 :])


def merge(base: Any, adapters: Any, lora: LoraConfig) -> Any:
    """Adds the adapters to the base, and returns plain parameters.

    Args:
      base: parameters, not in NF4.
      adapters: see `init_adapters`.
      lora: the config of the adapters.
    """

    def add(keys: tuple[Any, ...], w: jax.Array) -> jax.Array:
        adapter = adapter_of(adapters, path_of(keys))
        if adapter is None:
            return w
        return (w + delta(adapter, lora)).astype(w.dtype)

    return jax.tree.map_with_path(add, base)


def is_quantized(row: Parameter, lora: LoraConfig) -> bool:
    """Returns whether an array of the base is in NF4; only matrices of the layers can be."""
    return lora.base_dtype == "nf4" and row.is_matrix and row.is_stacked


def frozen_dtype(row: Parameter, lora: LoraConfig) -> Any:
    """Returns the dtype of an array of the base that is not in NF4."""
    whole = lora.base_dtype == "float32" or row.is_vector
    return np.dtype(np.float32 if whole else ml_dtypes.bfloat16)


def to_frozen(path: str, array: np.ndarray, lora: LoraConfig) -> Any:
    """Converts an array of the base to its stored form.

    Args:
      path: path of the array in the tree of parameters.
      array: its numbers; of one layer, if the parameter is stacked.
      lora: selects the stored form.
    """
    row = PARAMETERS[path]
    if is_quantized(row, lora):
        return nf4.quantize(array, len(row.inputs))
    return np.ascontiguousarray(array).astype(frozen_dtype(row, lora))


def to_float32(frozen: Any) -> np.ndarray:
    """Converts the result of `to_frozen` to float32."""
    if isinstance(frozen, nf4.NF4):
        return np.asarray(nf4.dequantize(jax.tree.map(jnp.asarray, frozen), jnp.float32))
    return frozen.astype(np.float32)


def abstract_base(params: Any, lora: LoraConfig, rows: Table = PARAMETERS) -> Any:
    """Returns shapes and dtypes of the base in its stored form.

    Args:
      params: shapes and dtypes of the parameters.
      lora: selects the stored form.
      rows: the model's table of parameters.
    """

    def leaf(keys: Any, x: Any) -> Any:
        row = rows[path_of(keys)]
        if is_quantized(row, lora):
            return nf4.abstract(x.shape[1:], len(row.inputs), x.shape[0])
        return jax.ShapeDtypeStruct(x.shape, frozen_dtype(row, lora))

    return jax.tree.map_with_path(leaf, params)
