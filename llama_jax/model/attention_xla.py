"""The XLA backend of attention: plain operations, for every platform and mesh.

Shape letters are those of llama.py; Q and C are the queries and keys of one block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model.attention_scores import (
    Options,
    SegmentIds,
    by_kv_head,
    masked_scores,
    visibility_mask,
)
from llama_jax.model.context_parallel import context_parallel_attention
from llama_jax.parallel.sharding import devices_along

# The largest number of blocks of queries per sequence. A block uses only the keys up to its own
# end, so most scores above the diagonal are never computed.
MAX_BLOCKS = 8
MIN_BLOCK = 64  # tokens; smaller blocks make the matrix products too small to be fast


def obstacle(q_BTNH: jax.Array, segment_ids: SegmentIds | None, options: Options) -> str:
    """Returns '': plain XLA supports all arguments of `attention.attention` everywhere."""
    return ""


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: SegmentIds | None,
    options: Options,
) -> jax.Array:
    """Computes attention in blocks, on any mesh; see `attention.Backend.attend`."""
    context = devices_along("seq")
    # `init_params` runs the model on two tokens, which the mesh does not divide.
    divides = q_BTNH.shape[0] % devices_along("batch") == 0 and q_BTNH.shape[1] % (2 * context) == 0
    if context > 1 and divides:
        return context_parallel_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids, options.window)
    return blocked_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids, options.window)


def blocked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: SegmentIds | None,
    window: int,
) -> jax.Array:
    """Computes causal attention for equal numbers of queries and keys, block by block.

    Args:
      q_BTNH: queries; all arguments are those of `attention.attention`.
      k_BSKH: keys.
      v_BSKH: values.
      segment_ids: segment ids of queries and keys.
      window: number of keys that a query sees; 0: all.
    """
    q_BKGTH, k_BKSH, v_BKSH = by_kv_head(q_BTNH, k_BSKH, v_BSKH)
    n_blocks = _n_blocks(q_BTNH.shape[1])
    out_BKGTH = _blocked(n_blocks, window, q_BKGTH, k_BKSH, v_BKSH, segment_ids)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def dense_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_offset: int | jax.Array,
    segment_ids: SegmentIds | None,
    window: int,
) -> jax.Array:
    """Computes causal attention for queries that begin at `q_offset`, with all scores at once.

    Args:
      q_BTNH: queries; all arguments are those of `attention.attention`.
      k_BSKH: keys.
      v_BSKH: values.
      q_offset: position of the first query among the keys.
      segment_ids: segment ids of queries and keys.
      window: number of keys that a query sees; 0: all.
    """
    q_BKGTH, k_BKSH, v_BKSH = by_kv_head(q_BTNH, k_BSKH, v_BSKH)
    queries_T = jnp.arange(q_BTNH.shape[1]) + q_offset
    mask = visibility_mask(queries_T, jnp.arange(k_BSKH.shape[1]), segment_ids, window)
    weights_BKGTS = jax.nn.softmax(masked_scores(q_BKGTH, k_BKSH, mask), axis=-1).astype(
        v_BKSH.dtype
    )
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)
    return checkpoint_name(out_BTNH, "attn_context")


def _n_blocks(length: int) -> int:
    """Returns the largest number of equal blocks that `MAX_BLOCKS` and `MIN_BLOCK` permit."""
    most = max(1, min(MAX_BLOCKS, length // MIN_BLOCK))
    return next(count for count in range(most, 0, -1) if length % count == 0)


def _block_scores(
    bounds: tuple[int, int, int],
    window: int,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    segment_ids: SegmentIds | None,
) -> jax.Array:
    """Computes the masked scores of the queries start..stop and the keys low..stop."""
    low, start, stop = bounds
    if segment_ids is not None:
        segment_ids = (segment_ids[0][:, start:stop], segment_ids[1][:, low:stop])
    mask = visibility_mask(jnp.arange(start, stop), jnp.arange(low, stop), segment_ids, window)
    return masked_scores(q_BKGTH[..., start:stop, :], k_BKSH[..., low:stop, :], mask)


def _bounds(n_blocks: int, window: int, length: int) -> list[tuple[int, int, int]]:
    """Returns, for each block of queries, the first key to use, and the block's start and stop."""
    size = length // n_blocks
    bounds = []
    for start in range(0, length, size):
        # Rounded down to the start of a block, so that gradients of keys are summed per block.
        low = max(0, start - window + 1) // size * size if window else 0
        bounds.append((low, start, start + size))
    return bounds


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(
    n_blocks: int,
    window: int,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segment_ids: SegmentIds | None,
) -> jax.Array:
    """Computes causal attention in blocks of queries, with FlashAttention's backward pass.

    The forward pass keeps one number per query: the log-sum-exp of its scores. The backward pass
    recomputes the weights from it (arXiv:2205.14135), so it needs no T x T array.
    """
    return _blocked_forward(n_blocks, window, q_BKGTH, k_BKSH, v_BKSH, segment_ids)[0]


def _blocked_forward(
    n_blocks: int,
    window: int,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segment_ids: SegmentIds | None,
) -> tuple[jax.Array, tuple]:
    out, log_sums = [], []
    for bounds in _bounds(n_blocks, window, q_BKGTH.shape[3]):
        scores_BKGQC = _block_scores(bounds, window, q_BKGTH, k_BKSH, segment_ids)
        max_BKGQ1 = jnp.max(scores_BKGQC, axis=-1, keepdims=True)
        exp_BKGQC = jnp.exp(scores_BKGQC - max_BKGQ1)
        sum_BKGQ1 = jnp.sum(exp_BKGQC, axis=-1, keepdims=True)
        out_BKGQH = jnp.einsum(
            "BKGQC,BKCH->BKGQH",
            exp_BKGQC.astype(v_BKSH.dtype),
            v_BKSH[..., bounds[0] : bounds[2], :],
            preferred_element_type=jnp.float32,
        )
        out.append((out_BKGQH / sum_BKGQ1).astype(q_BKGTH.dtype))
        log_sums.append(max_BKGQ1 + jnp.log(sum_BKGQ1))
    # One name for both: a remat policy that kept only one of them would recompute both.
    out_BKGTH = checkpoint_name(jnp.concatenate(out, axis=3), "attn_context")
    log_sum_BKGT1 = checkpoint_name(jnp.concatenate(log_sums, axis=3), "attn_context")
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, segment_ids, out_BKGTH, log_sum_BKGT1)


def _blocked_backward(n_blocks: int, window: int, saved: tuple, d_out_BKGTH: jax.Array) -> tuple:
    q_BKGTH, k_BKSH, v_BKSH, segment_ids, out_BKGTH, log_sum_BKGT1 = saved
    dtype, scale = q_BKGTH.dtype, 1 / math.sqrt(q_BKGTH.shape[-1])
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    all_bounds = _bounds(n_blocks, window, q_BKGTH.shape[3])
    d_q: list[jax.Array] = []
    d_k: list[jax.Array | float] = [0.0] * n_blocks
    d_v: list[jax.Array | float] = [0.0] * n_blocks
    for low, start, stop in all_bounds:
        queries = (..., slice(start, stop), slice(None))
        keys = (..., slice(low, stop), slice(None))
        scores_BKGQC = _block_scores((low, start, stop), window, q_BKGTH, k_BKSH, segment_ids)
        weights_BKGQC = jnp.exp(scores_BKGQC - log_sum_BKGT1[queries])
        d_out_BKGQH = d_out_BKGTH[queries]
        dot_BKGQ1 = jnp.sum(
            d_out_BKGQH.astype(jnp.float32) * out_BKGTH[queries], axis=-1, keepdims=True
        )
        d_weights_BKGQC = product("BKGQH,BKCH->BKGQC", d_out_BKGQH, v_BKSH[keys])
        d_scores_BKGQC = (weights_BKGQC * (d_weights_BKGQC - dot_BKGQ1) * scale).astype(dtype)
        d_q.append(product("BKGQC,BKCH->BKGQH", d_scores_BKGQC, k_BKSH[keys]))
        d_k_BKCH = product("BKGQC,BKGQH->BKCH", d_scores_BKGQC, q_BKGTH[queries])
        d_v_BKCH = product("BKGQC,BKGQH->BKCH", weights_BKGQC.astype(dtype), d_out_BKGQH)
        for index, (_, first, last) in enumerate(all_bounds[: len(d_q)]):
            if first >= low:
                d_k[index] += d_k_BKCH[..., first - low : last - low, :]
                d_v[index] += d_v_BKCH[..., first - low : last - low, :]
    d_q_BKGTH = jnp.concatenate(d_q, axis=3).astype(dtype)
    d_k_BKSH = jnp.concatenate(d_k, axis=2).astype(dtype)
    d_v_BKSH = jnp.concatenate(d_v, axis=2).astype(dtype)
    return d_q_BKGTH, d_k_BKSH, d_v_BKSH, None


_blocked.defvjp(_blocked_forward, _blocked_backward)
