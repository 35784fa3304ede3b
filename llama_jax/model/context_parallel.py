"""Context parallelism: each device has a part of the queries and gathers all keys and values.

Llama 3 also gathers keys and values (arXiv:2407.21783, section 3.3.2): with grouped heads they are
small. Under the causal mask, late queries see more keys than early ones. To balance the work, the
sequence is cut into two chunks per device, and device i computes chunks i and 2C - 1 - i: the two
chunks together see the same number of keys on every device. Outside of attention each device keeps
its contiguous part of the sequence. Devices exchange queries before attention and results after it.

Shape letters are those of llama.py; C is the size of the `context` axis, and Q the number of tokens
of a chunk. The array functions except `context_parallel_attention` run inside `jax.shard_map`.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model.attention_scores import (
    MASKED,
    SegmentIds,
    by_kv_head,
    masked_scores,
    visibility_mask,
)
from llama_jax.parallel.sharding import ACTIVATION_AXES, activation_spec, mesh_axes

(AXIS,) = mesh_axes(ACTIVATION_AXES["seq"])


def _owner(chunk: int, size: int) -> int:
    """Returns the index of the device that computes a chunk of queries."""
    return chunk if chunk < size else 2 * size - 1 - chunk


def query_order(length: int, size: int) -> np.ndarray:
    """Returns the position of each query in zigzag order, device after device."""
    chunks = np.arange(length).reshape(2 * size, -1)
    order = [chunk for device in range(size) for chunk in (device, 2 * size - 1 - device)]
    return chunks[order].reshape(-1)


def to_zigzag(x: jax.Array, axis: int) -> jax.Array:
    """Exchanges this device's contiguous part of a sequence for its chunks i and 2C - 1 - i."""
    size, index = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    parts = jnp.split(x, 2, axis=axis)
    # The first halves are the even chunks. No two of them go to the same device, so that one
    # permutation can move them; the same holds for the odd chunks.
    even, odd = (
        jax.lax.ppermute(part, AXIS, [(i, _owner(2 * i + half, size)) for i in range(size)])
        for half, part in enumerate(parts)
    )
    first_is_even = index % 2 == 0
    early = jnp.where(first_is_even, even, odd)
    late = jnp.where(first_is_even, odd, even)
    return jnp.concatenate([early, late], axis=axis)


def from_zigzag(x: jax.Array, axis: int) -> jax.Array:
    """Exchanges the chunks back: the inverse of `to_zigzag`."""
    size, index = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    early, late = jnp.split(x, 2, axis=axis)
    first_is_even = index % 2 == 0
    parts = (jnp.where(first_is_even, early, late), jnp.where(first_is_even, late, early))
    back = [
        jax.lax.ppermute(part, AXIS, [(_owner(2 * i + half, size), i) for i in range(size)])
        for half, part in enumerate(parts)
    ]
    return jnp.concatenate(back, axis=axis)


def gather(x: jax.Array, axis: int) -> jax.Array:
    """Gathers the whole sequence; the gradient is summed over devices and scattered."""
    return jax.lax.all_gather(x, AXIS, axis=axis, tiled=True)


def context_parallel_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: SegmentIds | None,
    window: int,
) -> jax.Array:
    """Computes causal attention on a mesh with a `context` axis.

    Args:
      q_BTNH: queries; all arguments are those of `attention.attention`.
      k_BSKH: keys.
      v_BSKH: values.
      segment_ids: segment ids of queries and keys.
      window: number of keys that a query sees; 0: all.
    """
    heads = activation_spec("batch", "seq", "heads", "head_dim")
    ids = activation_spec("batch", "seq")
    return jax.shard_map(
        functools.partial(_local, window=window),
        in_specs=(heads, heads, heads, None if segment_ids is None else (ids, ids)),
        out_specs=heads,
        check_vma=False,
    )(q_BTNH, k_BSKH, v_BSKH, segment_ids)


def _local(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: SegmentIds | None,
    *,
    window: int,
) -> jax.Array:
    n_chunks = 2 * jax.lax.axis_size(AXIS)
    arrays = by_kv_head(to_zigzag(q_BTNH, 1), gather(k_BSKH, 1), gather(v_BSKH, 1))
    q, k, v = (_chunks(x, -2, n) for x, n in zip(arrays, (2, n_chunks, n_chunks), strict=True))
    ids = None
    if segment_ids is not None:
        queries, keys = to_zigzag(segment_ids[0], 1), gather(segment_ids[1], 1)
        ids = (_chunks(queries, -1, 2), _chunks(keys, -1, n_chunks))
    out_2BKGQH = _pairs(window, q, k, v, ids)
    out_BKGTH = jnp.concatenate(list(out_2BKGQH), axis=-2)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)
    return from_zigzag(out_BTNH, 1)


def _chunks(x: jax.Array, axis: int, count: int) -> jax.Array:
    """Cuts an axis (negative) into `count` chunks along a new leading axis."""
    return jnp.stack(jnp.split(x, count, axis=axis))


def _pair(step: jax.Array, n_chunks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns one of the 2C + 1 pairs of chunks (queries, keys) that a device computes.

    Returns:
      0 for the early and 1 for the late chunk of queries; the index of the chunk of keys; and the
      index of the chunk of queries in the sequence.
    """
    index = jax.lax.axis_index(AXIS)
    early = step <= index
    slot = jnp.where(early, 0, 1)
    key = jnp.where(early, step, step - index - 1)
    return slot, key, jnp.where(early, index, n_chunks - 1 - index)


def _pair_scores(
    window: int, pair: tuple[jax.Array, ...], q: jax.Array, k: jax.Array, ids: SegmentIds | None
) -> jax.Array:
    slot, key, chunk = pair
    length = jnp.arange(q.shape[-2])
    if ids is not None:
        ids = (ids[0][slot], ids[1][key])
    size = q.shape[-2]
    mask = visibility_mask(length + chunk * size, length + key * size, ids, window)
    return masked_scores(q[slot], k[key], mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pairs(
    window: int, q: jax.Array, k: jax.Array, v: jax.Array, ids: SegmentIds | None
) -> jax.Array:
    """Computes attention for two chunks of queries, one pair of chunks after another.

    The softmax is accumulated as in FlashAttention (arXiv:2205.14135): only the scores of one pair
    exist at a time, forward and backward.

    Args:
      window: see `attention.attention`.
      q: the early and the late chunk of queries, 2 B K G Q H.
      k: all chunks of keys, 2C B K Q H.
      v: all chunks of values, 2C B K Q H.
      ids: segment ids of queries, 2 B Q, and keys, 2C B Q.
    """
    return _pairs_forward(window, q, k, v, ids)[0]


def _pairs_forward(
    window: int, q: jax.Array, k: jax.Array, v: jax.Array, ids: SegmentIds | None
) -> tuple[jax.Array, tuple[Any, ...]]:
    n_chunks = k.shape[0]

    def body(carry: tuple[jax.Array, ...], step: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        pair = _pair(step, n_chunks)
        slot, key, _ = pair
        scores = _pair_scores(window, pair, q, k, ids)
        out, maximum, total = (x[slot] for x in carry)
        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_maximum)
        rescale = jnp.exp(maximum - new_maximum)
        total = total * rescale + jnp.sum(weights, axis=-1, keepdims=True)
        out = out * rescale + jnp.einsum(
            "BKGQC,BKCH->BKGQH",
            weights.astype(v.dtype),
            v[key],
            preferred_element_type=jnp.float32,
        )
        new = (out, new_maximum, total)
        return tuple(x.at[slot].set(y) for x, y in zip(carry, new, strict=True)), None

    column = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    start: tuple[jax.Array, ...] = (jnp.zeros(q.shape, jnp.float32), column + MASKED, column)
    (out, maximum, total), _ = jax.lax.scan(body, start, jnp.arange(n_chunks + 1))
    # One name for both: a remat policy that kept only one of them would recompute both.
    out = checkpoint_name((out / total).astype(q.dtype), "attn_context")
    log_sum = checkpoint_name(maximum + jnp.log(total), "attn_context")
    return out, (q, k, v, ids, out, log_sum)


def _pairs_backward(window: int, saved: tuple[Any, ...], d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, ids, out, log_sum = saved
    n_chunks, scale = k.shape[0], 1 / math.sqrt(q.shape[-1])
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dot = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)

    def body(carry: tuple[jax.Array, ...], step: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        pair = _pair(step, n_chunks)
        slot, key, _ = pair
        weights = jnp.exp(_pair_scores(window, pair, q, k, ids) - log_sum[slot])
        d_weights = product("BKGQH,BKCH->BKGQC", d_out[slot], v[key])
        d_scores = (weights * (d_weights - dot[slot]) * scale).astype(q.dtype)
        d_q, d_k, d_v = carry
        d_q = d_q.at[slot].add(product("BKGQC,BKCH->BKGQH", d_scores, k[key]))
        d_k = d_k.at[key].add(product("BKGQC,BKGQH->BKCH", d_scores, q[slot]))
        d_v = d_v.at[key].add(product("BKGQC,BKGQH->BKCH", weights.astype(q.dtype), d_out[slot]))
        return (d_q, d_k, d_v), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    grads, _ = jax.lax.scan(body, start, jnp.arange(n_chunks + 1))
    d_q, d_k, d_v = (grad.astype(q.dtype) for grad in grads)
    return d_q, d_k, d_v, None


_pairs.defvjp(_pairs_forward, _pairs_backward)
