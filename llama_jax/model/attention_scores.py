"""Holds what attention backends are given, and the scores and masks that plain ones compute.

Shape letters as in llama.py; Q and C are the queries and keys of one block.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# Of queries B T and of keys B S.
SegmentIds = tuple[jax.Array, jax.Array]

# Finite, so that a query that sees no key (padding) gives an average instead of NaN.
MASKED = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Options:
    """Says how to compute attention: the arguments of `attention.attention` that are no arrays.

    Attributes:
      window: tokens that a query sees back, itself included; 0: all.
      tile: tokens of a tile of splash; 0: by the sequence length and the chip.
      backward: kernels for the gradients of splash: `split`, `fused` or `auto`.
    """

    window: int = 0
    tile: int = 0
    backward: str = "auto"


def by_kv_head(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """B T N H, B S K H, B S K H -> B K G T H, B K S H, B K S H."""
    batch, n_queries, n_heads, head_dim = q_BTNH.shape
    n_kv_heads = k_BSKH.shape[2]
    shape = (batch, n_queries, n_kv_heads, n_heads // n_kv_heads, head_dim)
    q_BKGTH = q_BTNH.reshape(shape).transpose(0, 2, 3, 1, 4)
    return q_BKGTH, k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)


def visibility_mask(
    queries_Q: jax.Array,
    keys_C: jax.Array,
    segment_ids: SegmentIds | None,
    window: int,
) -> jax.Array:
    """True where a query sees a key; broadcasts to B K G Q C."""
    mask_QC = keys_C[None, :] <= queries_Q[:, None]
    if window:
        mask_QC &= keys_C[None, :] > queries_Q[:, None] - window
    mask = mask_QC[None, None, None]
    if segment_ids is None:
        return mask
    return mask & (segment_ids[0][:, None, None, :, None] == segment_ids[1][:, None, None, None, :])


def masked_scores(q_BKGQH: jax.Array, k_BKCH: jax.Array, mask: jax.Array) -> jax.Array:
    """q k^T / sqrt(H) in float32, `MASKED` where the mask is False."""
    scores_BKGQC = jnp.einsum(
        "BKGQH,BKCH->BKGQC", q_BKGQH, k_BKCH, preferred_element_type=jnp.float32
    )
    return jnp.where(mask, scores_BKGQC / math.sqrt(q_BKGQH.shape[-1]), MASKED)
