"""Causal, grouped-query attention; one function over the backends."""

import math

import jax
import jax.numpy as jnp


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_offset: int | jax.Array = 0,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    backend: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, where query t sees the keys s <= t + q_offset of its segment.

    N query heads share K key/value heads in groups of G = N / K (arXiv:2305.13245).

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      q_offset: position of the first query among the keys; non-zero when decoding with a cache.
      segment_ids: ids of shape (B, T) for queries and (B, S) for keys; tokens of different
        documents, or of a document and its padding, do not see each other.
      backend: `xla` or `auto`.

    Returns:
      Values averaged per query, B T N H, in the dtype of `q_BTNH`; softmax is done in float32.

    Raises:
      ValueError: an unknown backend.
    """
    if backend not in ("auto", "xla"):
        raise ValueError(f"unknown attention backend {backend!r}")
    n_queries, n_keys = q_BTNH.shape[1], k_BSKH.shape[1]
    query_T1 = jnp.arange(n_queries)[:, None] + q_offset
    mask_BTS = (jnp.arange(n_keys)[None, :] <= query_T1)[None]
    if segment_ids is not None:
        mask_BTS &= segment_ids[0][:, :, None] == segment_ids[1][:, None, :]
    return _xla_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


def _xla_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    batch, n_queries, n_heads, head_dim = q_BTNH.shape
    n_kv_heads = k_BSKH.shape[2]
    groups = n_heads // n_kv_heads
    q_BTKGH = q_BTNH.reshape(batch, n_queries, n_kv_heads, groups, head_dim)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    scores_BKGTS = scores_BKGTS / math.sqrt(head_dim)
    # A finite minimum, so that a query that sees no key (padding) averages instead of giving NaN.
    minimum = jnp.finfo(jnp.float32).min
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, minimum)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(q_BTNH.shape)
