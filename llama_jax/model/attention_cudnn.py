"""The cuDNN backend of attention, for NVIDIA GPUs.

Shape letters are those of llama.py.
"""

import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model.attention_scores import Options, SegmentIds
from llama_jax.parallel.mesh import platform
from llama_jax.parallel.sharding import devices_along

MAX_HEAD_DIM = 128


def obstacle(q_BTNH: jax.Array, segment_ids: SegmentIds | None, options: Options) -> str:
    """Explains why cuDNN cannot run here, '' if it can; see `attention.Backend.obstacle`."""
    head_dim = q_BTNH.shape[-1]
    if platform() != "gpu":
        return f"cuDNN runs on NVIDIA GPUs, and this is a {platform()}; use xla"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16, not {q_BTNH.dtype}; use xla or model.compute_dtype=bfloat16"
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return f"cuDNN takes a head dim in multiples of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    if devices_along("seq") > 1:
        return "cuDNN attention does not divide the sequence over mesh.context; use xla"
    if is_determinism_requested():
        return (
            "XLA fails with cuDNN attention if XLA_FLAGS request the same bits in every run "
            "(openxla/xla#46500); use triton or xla"
        )
    return ""


def is_determinism_requested(env: Mapping[str, str] = os.environ) -> bool:
    """Returns whether XLA_FLAGS request GPU programs that give the same bits in every run."""
    # The same rules as in `xla_flags.flag_value`, which this room may not import.
    flags = [one.partition("=") for one in env.get("XLA_FLAGS", "").split()]
    given = {name: value if sign else "true" for name, sign, value in flags}  # the last one wins
    names = ("deterministic_ops", "exclude_nondeterministic_ops")
    return any(given.get(f"--xla_gpu_{name}") in ("true", "1") for name in names)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: SegmentIds | None,
    options: Options,
) -> jax.Array:
    """Computes attention and its gradients with cuDNN; see `attention.Backend.attend`."""
    window = options.window
    # cuDNN has no segments: JAX passes the mask as a bias, which takes B x T x T memory.
    mask = None
    if segment_ids is not None:
        mask = segment_ids[0][:, None, :, None] == segment_ids[1][:, None, None, :]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        mask=mask,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
    return checkpoint_name(out_BTNH, "attn_context")
