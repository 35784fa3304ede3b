"""The FlashAttention kernel in Pallas-Triton that comes with JAX, for NVIDIA GPUs.

It needs no library beside XLA, and knows segments, which cuDNN does not.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.parallel.sharding import activation_spec

TRITON_BLOCK = 128  # the kernel works on tiles of so many queries and keys
TRITON_HEAD_DIMS = (16, 128)  # smaller ones its matrix unit does not take, larger ones do not fit


def triton_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention, on each device's heads; the kernel knows no groups, so K heads become N.

    Args:
      q_BTNH: queries, as all arguments like those of `attention.attention`.
      k_BSKH: keys.
      v_BSKH: values.
      segment_ids_BT: of queries and keys.
      interpret: run the kernel in Python, on any platform (tests).
    """
    from jax.experimental.pallas.ops.gpu.attention import mha

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        group = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        scale = 1 / math.sqrt(q.shape[-1])
        return mha(q, k, v, segments, sm_scale=scale, causal=True, interpret=interpret)

    if jax.sharding.get_abstract_mesh().empty:
        out_BTNH = local(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    else:
        heads = activation_spec("batch", "seq", "heads", "head_dim")
        ids = None if segment_ids_BT is None else activation_spec("batch", "seq")
        out_BTNH = jax.shard_map(
            local, in_specs=(heads, heads, heads, ids), out_specs=heads, check_vma=False
        )(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT)
    return checkpoint_name(out_BTNH, "attn_context")
