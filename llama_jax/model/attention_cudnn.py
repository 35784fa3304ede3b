"""Computes attention by cuDNN, on NVIDIA GPUs.

Shape letters as in llama.py.
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
    """Says why cuDNN cannot compute this here, and what would work; '' if it can."""
    head_dim = q_BTNH.shape[-1]
    if platform() != "gpu":
        return f"cuDNN runs on NVIDIA GPUs, and this is a {platform()}; use xla"
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16, not {q_BTNH.dtype}; use xla or model.compute_dtype"
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return f"cuDNN takes heads of a multiple of 8 up to {MAX_HEAD_DIM}, not {head_dim}"
    if devices_along("seq") > 1:
        return "cuDNN attention does not divide the sequence over mesh.context; use xla"
    if is_determinism_requested():
        return (
            "XLA fails with cuDNN attention where XLA_FLAGS ask for the same bits in every run "
            "(openxla/xla#46500); use triton or xla"
        )
    return ""


def is_determinism_requested(env: Mapping[str, str] = os.environ) -> bool:
    """Whether XLA_FLAGS ask for programs on GPUs that give the same bits in every run."""
    # As `xla_flags.flag_value` reads them, which is of a room that this one does not import.
    flags = [one.partition("=") for one in env.get("XLA_FLAGS", "").split()]
    given = {name: value if sign else "true" for name, sign, value in flags}  # the last one counts
    names = ("deterministic_ops", "exclude_nondeterministic_ops")
    return any(given.get(f"--xla_gpu_{name}") in ("true", "1") for name in names)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: SegmentIds | None,
    options: Options,
) -> jax.Array:
    """Computes attention and its gradients by cuDNN; arguments as of `attention.Backend`."""
    window = options.window
    # cuDNN itself knows no segments: JAX hands it the mask as a bias, which costs B x T x T.
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
