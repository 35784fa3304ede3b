"""The form in which a base is kept below adapters: smaller than the weights that are trained.

Matrices are in `lora.base_dtype`. NF4 is for those of the layers; embedding and output matrix are
then bfloat16, as in QLoRA. The scales of norms stay float32: they are small, and used in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from llama_jax import nf4
from llama_jax.lora_config import MATRICES, LoraConfig


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


def freeze(path: str, array: np.ndarray, lora: LoraConfig) -> Any:
    """An array of the base, of one layer where it is stacked, as it is kept."""
    if is_quantized(path, lora):
        return nf4.quantize(array, n_inputs(path))
    return np.ascontiguousarray(array).astype(frozen_dtype(path, lora))


def thaw(frozen: Any) -> np.ndarray:
    """The float32 numbers that `freeze` kept."""
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
