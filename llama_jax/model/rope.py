"""Rotary position embeddings (arXiv:2104.09864), and ways to stretch them to long contexts.

Shapes are in the names: B batch, T position, N heads, H head dim, h = H / 2 pairs of a head.
"""

import math

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.parallel.mesh import platform


def rope_frequencies(config: ModelConfig, lengths: jax.Array | None = None) -> jax.Array:
    """Computes the frequency of each rotated pair, in radians per token, float32.

    The method is `rope_scaling`. `linear` divides all frequencies by the factor (arXiv:2306.15595).
    `llama3` divides the frequencies with long wavelengths and keeps those with short ones, and
    `yarn` (arXiv:2309.00071) does the same between other bounds. `dynamic` increases theta with the
    length of a sequence that is longer than `rope_original_context`.

    Args:
      config: the model.
      lengths: tokens of each sequence, which only `dynamic` uses; None: the original context.

    Returns:
      h frequencies; for `dynamic` with lengths, h for each length, on a last axis.
    """
    c = config
    exponent_h = jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim
    if c.rope_scaling == "dynamic" and lengths is not None:
        growth = jnp.maximum(lengths / c.rope_original_context, 1.0)
        stretch = c.rope_scaling_factor * (growth - 1) + 1
        theta = c.rope_theta * stretch ** (c.head_dim / (c.head_dim - 2))
        return theta[..., None] ** -exponent_h
    frequency_h = c.rope_theta**-exponent_h
    if c.rope_scaling == "linear":
        return frequency_h / c.rope_scaling_factor
    if c.rope_scaling == "yarn":
        keep_h = 1 - _yarn_ramp(c)
    elif c.rope_scaling == "llama3" and c.rope_scaling_factor != 1:
        turns_h = c.rope_original_context / (2 * jnp.pi / frequency_h)  # in the original context
        low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
        keep_h = jnp.clip((turns_h - low) / (high - low), 0, 1)
    else:
        return frequency_h
    return (1 - keep_h) * frequency_h / c.rope_scaling_factor + keep_h * frequency_h


def _yarn_ramp(config: ModelConfig) -> jax.Array:
    """Returns a ramp over the h pairs, which says how much of the scaling each pair gets.

    The ramp is 0 for pairs that turn `rope_beta_fast` times or more in the original context, and 1
    for pairs that turn `rope_beta_slow` times or less.
    """
    c = config

    def pair(turns: float) -> float:
        """Returns the index (a fraction) of the pair with this number of turns."""
        wavelength = c.rope_original_context / turns
        return c.head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = pair(c.rope_beta_fast), pair(c.rope_beta_slow)
    if c.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    width = high - low or 0.001
    return jnp.clip((jnp.arange(c.head_dim // 2, dtype=jnp.float32) - low) / width, 0, 1)


def document_lengths(positions_BT: jax.Array) -> jax.Array:
    """Returns the length of each token's document, B T: its last position in the row, plus 1."""
    length = positions_BT.shape[1]
    index_T = jnp.arange(length)
    goes_on_BT = positions_BT[:, 1:] == positions_BT[:, :-1] + 1
    goes_on_BT = jnp.pad(goes_on_BT, ((0, 0), (0, 1)))
    end_BT = jax.lax.cummin(jnp.where(goes_on_BT, length - 1, index_T), axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, end_BT, axis=1) + 1


def rope_tables(
    positions_BT: jax.Array, config: ModelConfig, lengths_B: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """Computes cos and sin of the rotary angles, both B T 1 h, float32.

    Args:
      positions_BT: position of each token in its document.
      config: the model.
      lengths_B: tokens of each row's whole sequence, for rows that hold only a part of it; only
        `dynamic` uses it. None: `positions_BT` contains each document to its end.
    """
    lengths_BT = None
    if config.rope_scaling == "dynamic":
        lengths_BT = document_lengths(positions_BT) if lengths_B is None else lengths_B[:, None]
    # float32, because bfloat16 rounds position 257 to 256.
    frequency = rope_frequencies(config, lengths_BT)
    if lengths_BT is not None:
        frequency = frequency[:, :, None]
    angle_BT1h = positions_BT[..., None, None].astype(jnp.float32) * frequency
    size = config.rope_amplitude
    if size == 1:
        return jnp.cos(angle_BT1h), jnp.sin(angle_BT1h)
    return size * jnp.cos(angle_BT1h), size * jnp.sin(angle_BT1h)


def apply_rope(x_BTNH: jax.Array, cos_BT1h: jax.Array, sin_BT1h: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2), as in Hugging Face's layout; Meta's rotates (2i, 2i + 1).

    Args:
      x_BTNH: queries or keys.
      cos_BT1h: cosines, see `rope_tables`.
      sin_BT1h: sines, see `rope_tables`.
    """
    if platform() == "tpu":
        return rotate_by_product(x_BTNH, jnp.tile(cos_BT1h, 2), jnp.tile(sin_BT1h, 2))
    # Without the barrier, XLA rotates a gradient again inside each product that reads it.
    x_BTNH = jax.lax.optimization_barrier(x_BTNH)
    first, second = (half.astype(jnp.float32) for half in jnp.split(x_BTNH, 2, axis=-1))
    rotated = (first * cos_BT1h - second * sin_BT1h, second * cos_BT1h + first * sin_BT1h)
    return jnp.concatenate([half.astype(x_BTNH.dtype) for half in rotated], axis=-1)


@jax.custom_vjp
def rotate_by_product(x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array) -> jax.Array:
    """Rotates as `apply_rope` does, but swaps the halves of a head by a matrix product, for TPUs.

    A TPU's vector unit takes several passes to slice and join vectors of half a head. Its matrix
    unit swaps them at the same time as other work, and exactly, because each sum has one nonzero
    term. A step of 7B takes 3% fewer cycles by the compiler's estimate.

    Args:
      x_BTNH: queries or keys.
      cos_BT1H: cosines, for both halves of a head.
      sin_BT1H: sines, for both halves of a head.
    """
    size = x_BTNH.shape[-1]
    signs_H = jnp.where(jnp.arange(size) < size // 2, 1, -1).astype(x_BTNH.dtype)
    # Row i has its 1 or -1 in column i + H/2 (modulo H): the product is the second half, negated,
    # and then the first half.
    swap_HH = jnp.roll(jnp.diag(signs_H), size // 2, axis=1)
    other_BTNH = jnp.einsum(
        "BTNH,HI->BTNI",
        x_BTNH,
        swap_HH,
        precision=jax.lax.Precision.HIGHEST,  # for float32; products of bfloat16 are exact anyway
        preferred_element_type=jnp.float32,
    )
    rotated_BTNH = x_BTNH.astype(jnp.float32) * cos_BT1H + other_BTNH * sin_BT1H
    return rotated_BTNH.astype(x_BTNH.dtype)


_Tables = tuple[jax.Array, jax.Array]


def _rotate_forward(
    x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array
) -> tuple[jax.Array, _Tables]:
    return rotate_by_product(x_BTNH, cos_BT1H, sin_BT1H), (cos_BT1H, sin_BT1H)


def _rotate_backward(saved: _Tables, d_out: jax.Array) -> tuple[jax.Array, None, None]:
    cos_BT1H, sin_BT1H = saved
    return rotate_by_product(d_out, cos_BT1H, -sin_BT1H), None, None  # the inverse rotation


rotate_by_product.defvjp(_rotate_forward, _rotate_backward)
