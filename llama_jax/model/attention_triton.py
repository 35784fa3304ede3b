"""The Triton backend of attention: a Pallas kernel that comes with JAX, for NVIDIA GPUs.

It needs no library except XLA, and supports segments, which cuDNN does not. Shape letters are those
of llama.py.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model.attention_scores import Options, SegmentIds
from llama_jax.parallel.mesh import platform
from llama_jax.parallel.sharding import activation_spec, devices_along

BLOCK = 128  # queries and keys per tile of the kernel
HEAD_DIMS = (16, 128)  # the matrix unit takes no smaller heads, and larger ones do not fit


def obstacle(q_BTNH: jax.Array, segment_ids: SegmentIds | None, options: Options) -> str:
    """Explains why the kernel cannot run here, '' if it can; see `attention.Backend.obstacle`."""
    _, length, _, head_dim = q_BTNH.shape
    smallest, largest = HEAD_DIMS
    if platform() != "gpu":
        return f"the Triton kernel runs on NVIDIA GPUs, and this is a {platform()}; use xla"
    if not smallest <= head_dim <= largest:
        return f"the Triton kernel takes a head dim of {smallest} to {largest}, not {head_dim}"
    if length % BLOCK:
        return f"the Triton kernel takes multiples of {BLOCK} tokens, not {length}"
    if devices_along("seq") > 1:
        return "Triton attention does not divide the sequence over mesh.context; use xla"
    if options.window:
        return "the Triton kernel has no sliding window; use cudnn or xla"
    if segment_ids is not None and segment_ids[0] is not segment_ids[1]:
        return "the Triton kernel takes one array of segment ids, for queries and keys; use xla"
    return ""


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: SegmentIds | None,
    options: Options,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention on each device's heads; see `attention.Backend.attend`.

    The kernel does not support grouped heads, so the K kv heads are repeated to N.

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      segment_ids: the same array for queries and keys.
      options: must have no window.
      interpret: run the kernel in Python, on any platform (for tests).
    """
    from jax.experimental.pallas.ops.gpu.attention import mha

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        group = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        scale = 1 / math.sqrt(q.shape[-1])
        return mha(q, k, v, segments, sm_scale=scale, causal=True, interpret=interpret)

    segment_ids_BT = None if segment_ids is None else segment_ids[0]
    if jax.sharding.get_abstract_mesh().empty:
        out_BTNH = local(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    else:
        heads = activation_spec("batch", "seq", "heads", "head_dim")
        ids = None if segment_ids_BT is None else activation_spec("batch", "seq")
        out_BTNH = jax.shard_map(
            local, in_specs=(heads, heads, heads, ids), out_specs=heads, check_vma=False
        )(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    return checkpoint_name(out_BTNH, "attn_context")
