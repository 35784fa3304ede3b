"""Causal, grouped-query attention; one function over the backends.

Shape letters as in llama.py. Every backend computes the same: none takes a mask that it cannot
honour.
"""

import jax
import jax.numpy as jnp

from llama_jax.errors import UserError
from llama_jax.model.attention_cudnn import (
    CUDNN_MAX_HEAD_DIM,
    cudnn_attention,
    is_determinism_requested,
)
from llama_jax.model.attention_splash import SPLASH_LANES, splash_attention
from llama_jax.model.attention_triton import TRITON_BLOCK, TRITON_HEAD_DIMS, triton_attention
from llama_jax.model.attention_xla import SegmentIds, blocked_attention, dense_attention
from llama_jax.model.context_parallel import context_parallel_attention
from llama_jax.parallel.mesh import platform as _platform
from llama_jax.parallel.sharding import devices_along


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    q_offset: int | jax.Array = 0,
    segment_ids: SegmentIds | None = None,
    window: int = 0,
    backend: str = "auto",
    tile: int = 0,
    backward: str = "auto",
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
      window: a query sees only the last so many keys, itself included (sliding-window attention,
        Mistral, arXiv:2310.06825); 0: all.
      backend: `xla` everywhere; `splash`, a Pallas kernel on TPU; `cudnn` and `triton` (a Pallas
        kernel too) on NVIDIA GPUs; `auto` takes splash or cudnn where it can compute this.
        Decoding is always `xla`.
      tile: tokens of a tile of splash; 0: by the sequence length and the chip.
      backward: `split` or `fused` kernels for the gradients of splash; `auto`: as `tile`.

    Returns:
      Values averaged per query, B T N H, in the dtype of `q_BTNH`; softmax is done in float32.

    Raises:
      ValueError: an unknown backend.
      UserError: one that cannot compute this here; says what would work.
    """
    if not (isinstance(q_offset, int) and q_offset == 0 and q_BTNH.shape[1] == k_BSKH.shape[1]):
        return dense_attention(q_BTNH, k_BSKH, v_BSKH, q_offset, segment_ids, window)
    platform = _platform()
    if backend == "auto":
        fast = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
        backend = "xla" if _obstacle(fast, platform, q_BTNH) else fast
    obstacle = _obstacle(backend, platform, q_BTNH)
    if backend == "splash" and not obstacle:
        obstacle = _tile_obstacle(q_BTNH.shape[1] // devices_along("seq"), tile)
    if backend == "triton" and not obstacle:
        obstacle = _triton_obstacle(segment_ids, window)
    if obstacle:
        raise UserError(f"model.attention={backend}: {obstacle}")
    if backend == "splash":
        return splash_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids, window, tile, backward)
    if backend == "cudnn":
        return cudnn_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids, window)
    if backend == "triton":
        ids_BT = None if segment_ids is None else segment_ids[0]
        return triton_attention(q_BTNH, k_BSKH, v_BSKH, ids_BT)
    if devices_along("seq") > 1 and _divides(q_BTNH):
        return context_parallel_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids, window)
    return blocked_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids, window)


def _divides(q_BTNH: jax.Array) -> bool:
    """Whether the mesh divides batch and sequence; it does not when parameters are initialised."""
    batch, chunks = devices_along("batch"), 2 * devices_along("seq")
    return q_BTNH.shape[0] % batch == 0 and q_BTNH.shape[1] % chunks == 0


def _obstacle(backend: str, platform: str, q_BTNH: jax.Array) -> str:
    """Why a backend cannot compute this here; empty if it can."""
    _, length, _, head_dim = q_BTNH.shape
    context = devices_along("seq")
    if backend == "xla":
        return ""
    if backend == "splash":
        if platform != "tpu":
            return f"the splash kernel runs on TPUs, and this is a {platform}; use xla"
        if length % (SPLASH_LANES * context):
            return (
                f"the splash kernel takes multiples of {SPLASH_LANES * context} tokens with "
                f"context={context}, not {length}; use xla"
            )
        return ""
    if backend == "cudnn":
        if platform != "gpu":
            return f"cuDNN runs on NVIDIA GPUs, and this is a {platform}; use xla"
        if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
            return f"cuDNN takes bfloat16, not {q_BTNH.dtype}; use xla or model.compute_dtype"
        if head_dim > CUDNN_MAX_HEAD_DIM or head_dim % 8:
            return (
                f"cuDNN takes heads of a multiple of 8 up to {CUDNN_MAX_HEAD_DIM}, not {head_dim}"
            )
        if context > 1:
            return "cuDNN attention does not divide the sequence over mesh.context; use xla"
        if is_determinism_requested():
            return (
                "XLA fails with cuDNN attention where XLA_FLAGS ask for the same bits in every run "
                "(openxla/xla#46500); use triton or xla"
            )
        return ""
    if backend == "triton":
        smallest, largest = TRITON_HEAD_DIMS
        if platform != "gpu":
            return f"the Triton kernel runs on NVIDIA GPUs, and this is a {platform}; use xla"
        if not smallest <= head_dim <= largest:
            return f"the Triton kernel takes heads of {smallest} to {largest}, not {head_dim}"
        if length % TRITON_BLOCK:
            return f"the Triton kernel takes multiples of {TRITON_BLOCK} tokens, not {length}"
        if context > 1:
            return "Triton attention does not divide the sequence over mesh.context; use xla"
        return ""
    raise ValueError(f"unknown attention backend {backend!r}")


def _tile_obstacle(length: int, tile: int) -> str:
    """Why the splash kernel cannot take tiles of so many tokens of a sequence."""
    if tile and length % tile:
        return f"{length} tokens of a device are no multiple of model.attention_tile={tile}; use 0"
    return ""


def _triton_obstacle(segment_ids: SegmentIds | None, window: int) -> str:
    """What the Triton kernel cannot honour."""
    if window:
        return "the Triton kernel has no sliding window; use cudnn or xla"
    if segment_ids is not None and segment_ids[0] is not segment_ids[1]:
        return "the Triton kernel takes one array of segment ids, for queries and keys; use xla"
    return ""
