"""Types that all attention backends share, and the scores and masks of those in plain JAX.

Shape letters are those of llama.py; Q and C are the queries and keys of one block.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

# The segment ids of queries, B T, and of keys, B S.
SegmentIds = tuple[jax.Array, jax.Array]

# Finite, so that the result for a query that sees no key (padding) is an average, not NaN.
MASKED = float(jnp.finfo(jnp.float32).min)


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `attention.attention` that configure a backend.

    Attributes:
      window: number of keys that a query sees, its own included; 0: all.
      tile: tokens per tile of the splash kernel; 0: chosen by sequence length and chip.
      backward: splash kernels for the gradients: `split`, `fused` or `auto`.
    """

    window: int = 0
    tile: int = 0
    backward: str = "auto"


def by_kv_head(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Groups the query heads by kv head, and moves the head axes to the front.

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.

    Returns:
      Queries B K G T H, keys B K S H and values B K S H.
    """
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
    """Makes the mask of a block of scores: True where a query sees a key.

    Args:
      queries_Q: positions of the queries.
      keys_C: positions of the keys.
      segment_ids: segment ids of these queries, B Q, and keys, B C; None: one segment.
      window: number of keys that a query sees, its own included; 0: all.

    Returns:
      An array of booleans that broadcasts to B K G Q C.
    """
    mask_QC = keys_C[None, :] <= queries_Q[:, None]
    if window:
        mask_QC &= keys_C[None, :] > queries_Q[:, None] - window
    mask = mask_QC[None, None, None]
    if segment_ids is None:
        return mask
    return mask & (segment_ids[0][:, None, None, :, None] == segment_ids[1][:, None, None, None, :])


def masked_scores(q_BKGQH: jax.Array, k_BKCH: jax.Array, mask: jax.Array) -> jax.Array:
    """Computes q k^T / sqrt(H) in float32.

    Args:
      q_BKGQH: queries.
      k_BKCH: keys.
      mask: the mask of `visibility_mask`; the score is `MASKED` where it is False.
    """
    scores_BKGQC = jnp.einsum(
        "BKGQH,BKCH->BKGQC", q_BKGQH, k_BKCH, preferred_element_type=jnp.float32
    )
    return jnp.where(mask, scores_BKGQC / math.sqrt(q_BKGQH.shape[-1]), MASKED)
