"""NF4 with double quantisation (QLoRA, arXiv:2305.14314), as bitsandbytes defines it.

A weight is one of 16 levels, the quantiles of a normal distribution, times the scale of its block
of 64 weights: the largest magnitude in the block. The scales are quantised as well: their mean
is subtracted, each is divided by the largest magnitude in its group of 256, and the results are
rounded to the 256 values of an 8-bit number with a tapered fraction (arXiv:1511.04561). The total
is 4 + 8/64 + 32/(64 x 256) = 4.127 bits per weight.

bitsandbytes cuts torch's (out, in) matrices into blocks row by row: a block holds 64 inputs of one
output. Matrices here are (in, out), so a block runs along the input axis; the numbers are the same.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llama_jax.config import NF4_BLOCK

GROUP = 256  # number of scales that share a scale
_LEAST = np.finfo(np.float32).tiny  # replaces a scale of 0, which would divide by zero
# From appendix E of QLoRA, with the digits of bitsandbytes.
LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _tapered() -> np.ndarray:
    """Returns the 256 values of a scale: 7 decades, each with one fraction bit more than the last.

    It rounds at the same places as torch's `linspace` and bitsandbytes, so the bits are the same.
    """
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    for decade in range(7):
        count = 2**decade
        step = np.float64(np.float32(np.float32(0.9) / np.float32(count)))
        index = np.arange(count + 1)
        from_below, from_above = (
            np.float64(np.float32(0.1)) + step * index,
            1 - step * (count - index),
        )
        edges = np.where(index < (count + 1) // 2, from_below, from_above).astype(np.float32)
        means = np.float32(10.0 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [means, -means]
    return np.sort(np.concatenate(values))


SCALES = _tapered()


@struct.dataclass
class NF4:
    """A matrix in NF4, or a stack of matrices with a leading axis L.

    In shapes, I is the product of the input sizes, and O.. are the output axes.

    Attributes:
      codes: I/2 O.., uint8: the levels of two consecutive inputs, the first in the upper four bits.
      scales: I/64 O.., uint8: one code per block.
      groups: float32: one scale per 256 block scales, in the order of bitsandbytes: all blocks of
        the first output, then those of the second, and so on.
      offset: float32: the mean of the block scales.
      shape: shape of the matrix, without L.
    """

    codes: Any
    scales: Any
    groups: Any
    offset: Any
    shape: tuple[int, ...] = struct.field(pytree_node=False)


@jax.jit
def _nearest(blocks: jax.Array, inverses: jax.Array) -> jax.Array:
    """Returns the codes of weights I/64 64 O, given the inverse scales I/64 O.

    It multiplies by the inverse, which every machine rounds alike; a division might differ.
    """
    scaled = blocks * inverses[:, None]
    between = (LEVELS[:-1] + LEVELS[1:]) / 2
    return sum((scaled > edge).astype(jnp.uint8) for edge in between)


def quantize(matrix: np.ndarray, n_inputs: int) -> NF4:
    """Converts the matrix of one layer to NF4: NumPy arrays with the same bits on every machine.

    Args:
      matrix: the numbers, input axes first, then output axes.
      n_inputs: number of input axes.
    """
    outputs = matrix.shape[n_inputs:]
    flat = np.asarray(matrix, np.float32).reshape(-1, NF4_BLOCK, int(np.prod(outputs)))
    largest = np.maximum(flat.max(axis=1), -flat.min(axis=1))
    codes = np.asarray(_nearest(flat, 1 / np.maximum(largest, _LEAST)))
    pairs = codes.reshape(-1, 2, codes.shape[-1])
    # Summed in float64 and then rounded, so that the order of the sum does not change the mean.
    offset = np.float32(largest.mean(dtype=np.float64))
    ordered = (largest - offset).T.reshape(-1)
    padded = np.pad(ordered, (0, -ordered.size % GROUP)).reshape(-1, GROUP)
    groups = np.abs(padded).max(axis=1)
    scaled = padded * (1 / np.maximum(groups, _LEAST))[:, None]
    between = (SCALES[:-1] + SCALES[1:]) / 2
    scales = np.searchsorted(between, scaled.reshape(-1)[: ordered.size]).astype(np.uint8)
    return NF4(
        codes=(pairs[:, 0] << 4 | pairs[:, 1]).reshape(-1, *outputs),
        scales=np.ascontiguousarray(scales.reshape(-1, len(largest)).T).reshape(-1, *outputs),
        groups=groups,
        offset=offset,
        shape=matrix.shape,
    )


def abstract(shape: tuple[int, ...], n_inputs: int, layers: int) -> NF4:
    """Returns the shapes and dtypes of a stack of matrices in NF4.

    Args:
      shape: shape of the matrix of one layer.
      n_inputs: number of input axes.
      layers: number of layers.
    """
    inputs, outputs = int(np.prod(shape[:n_inputs])), shape[n_inputs:]
    scales = inputs // NF4_BLOCK * int(np.prod(outputs))

    def leaf(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((layers, *sizes), dtype)

    return NF4(
        codes=leaf(jnp.uint8, inputs // 2, *outputs),
        scales=leaf(jnp.uint8, inputs // NF4_BLOCK, *outputs),
        groups=leaf(jnp.float32, -(-scales // GROUP)),
        offset=leaf(jnp.float32),
        shape=shape,
    )


@functools.partial(jax.jit, static_argnums=1)
def dequantize(matrix: NF4, dtype: Any) -> jax.Array:
    """Converts the matrix of one layer to `dtype`; computes in float32 and rounds at the end."""
    blocks, outputs = matrix.scales.shape[0], matrix.scales.shape[1:]
    # The index of each scale in the order of bitsandbytes, computed without a transpose.
    place = jnp.arange(blocks).reshape(-1, *(1 for _ in outputs))
    place += blocks * jnp.arange(int(np.prod(outputs))).reshape(1, *outputs)
    scales = jnp.asarray(SCALES)[matrix.scales] * matrix.groups[place // GROUP] + matrix.offset
    codes = jnp.stack([matrix.codes >> 4, matrix.codes & 15], axis=1)
    levels = jnp.asarray(LEVELS)[codes].reshape(blocks, NF4_BLOCK, *outputs)
    return (levels * scales[:, None]).astype(dtype).reshape(matrix.shape)
