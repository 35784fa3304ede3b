"""Rotary position embeddings (arXiv:2104.09864), and the ways of stretching them to long contexts.

Shapes are in the names: B batch, T position, N heads, H head dim, h = H / 2 pairs of a head.
"""

import math

import jax
import jax.numpy as jnp

from llama_jax.config import ModelConfig
from llama_jax.parallel.mesh import platform


def rope_frequencies(config: ModelConfig, lengths: jax.Array | None = None) -> jax.Array:
    """Radians per token of each rotated pair, float32, as `rope_scaling` says.

    `linear` divides all of them by the factor (arXiv:2306.15595). `llama3` divides those of long
    wavelengths and keeps those of short ones, and `yarn` (arXiv:2309.00071) does the same between
    other bounds. `dynamic` enlarges theta with the length of the sequence, once this is longer than
    `rope_original_context`.

    Args:
      config: the model.
      lengths: tokens of the sequence, which only `dynamic` looks at; None: the original context.

    Returns:
      h of them; where `dynamic` gets lengths, the shape of these and h.
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
        turns_h = c.rope_original_context / (2 * jnp.pi / frequency_h)  # over the original context
        low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
        keep_h = jnp.clip((turns_h - low) / (high - low), 0, 1)
    else:
        return frequency_h
    return (1 - keep_h) * frequency_h / c.rope_scaling_factor + keep_h * frequency_h


def _yarn_ramp(config: ModelConfig) -> jax.Array:
    """From 0 for pairs that turn `rope_beta_fast` times over the original context, to 1, h."""
    c = config

    def pair(turns: float) -> float:
        """The pair (not whole) that turns so often."""
        wavelength = c.rope_original_context / turns
        return c.head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(c.rope_theta))

    low, high = pair(c.rope_beta_fast), pair(c.rope_beta_slow)
    if c.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, c.head_dim - 1)
    width = high - low or 0.001
    return jnp.clip((jnp.arange(c.head_dim // 2, dtype=jnp.float32) - low) / width, 0, 1)


def document_lengths(positions_BT: jax.Array) -> jax.Array:
    """Of each token, how many its document has in this row: the last position there + 1; B T."""
    length = positions_BT.shape[1]
    index_T = jnp.arange(length)
    goes_on_BT = positions_BT[:, 1:] == positions_BT[:, :-1] + 1
    goes_on_BT = jnp.pad(goes_on_BT, ((0, 0), (0, 1)))
    end_BT = jax.lax.cummin(jnp.where(goes_on_BT, length - 1, index_T), axis=1, reverse=True)
    return jnp.take_along_axis(positions_BT, end_BT, axis=1) + 1


def rope_tables(
    positions_BT: jax.Array, config: ModelConfig, lengths_B: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """cos and sin of the rotary angles, both B T 1 h, float32.

    Args:
      positions_BT: of each token in its document.
      config: the model.
      lengths_B: tokens of each row's sequence, where the row holds only a part of it; `dynamic`
        alone looks at it. None: each document has the length that it has here.
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
    """Rotates pairs (i, i + H/2), the layout of Hugging Face; Meta's rotates (2i, 2i + 1)."""
    if platform() == "tpu":
        return rotate_by_product(x_BTNH, jnp.tile(cos_BT1h, 2), jnp.tile(sin_BT1h, 2))
    # The barrier keeps a gradient from being rotated anew inside each product that reads it.
    x_BTNH = jax.lax.optimization_barrier(x_BTNH)
    first, second = (half.astype(jnp.float32) for half in jnp.split(x_BTNH, 2, axis=-1))
    rotated = (first * cos_BT1h - second * sin_BT1h, second * cos_BT1h + first * sin_BT1h)
    return jnp.concatenate([half.astype(x_BTNH.dtype) for half in rotated], axis=-1)


@jax.custom_vjp
def rotate_by_product(x_BTNH: jax.Array, cos_BT1H: jax.Array, sin_BT1H: jax.Array) -> jax.Array:
    """The same as `apply_rope`, for TPUs: the halves of a head change places in a matrix product.

    To slice and join vectors of half a head takes a TPU's vector unit several passes; its matrix
    unit does it beside the rest, exactly, as each sum has one term. A step of 7B takes 3% fewer
    cycles by the compiler's estimate.

    Args:
      x_BTNH: what is rotated.
      cos_BT1H: cosines, for both halves of a head.
      sin_BT1H: sines, for both halves of a head.
    """
    size = x_BTNH.shape[-1]
    signs_H = jnp.where(jnp.arange(size) < size // 2, 1, -1).astype(x_BTNH.dtype)
    # Row i has its one in column i + H/2: first the second half, negative, then the first half.
    swap_HH = jnp.roll(jnp.diag(signs_H), size // 2, axis=1)
    other_BTNH = jnp.einsum(
        "BTNH,HI->BTNI",
        x_BTNH,
        swap_HH,
        precision=jax.lax.Precision.HIGHEST,  # of float32; bfloat16 is multiplied exactly anyway
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
    return rotate_by_product(d_out, cos_BT1H, -sin_BT1H), None, None  # the way back


rotate_by_product.defvjp(_rotate_forward, _rotate_backward)
