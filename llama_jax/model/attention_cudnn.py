"""Attention by cuDNN, on NVIDIA GPUs.

Shape letters as in llama.py.
"""

import os
from collections.abc import Mapping

import jax
from jax.ad_checkpoint import checkpoint_name

from llama_jax.model.attention_xla import SegmentIds

CUDNN_MAX_HEAD_DIM = 128


def is_determinism_requested(env: Mapping[str, str] = os.environ) -> bool:
    """Whether XLA_FLAGS ask for programs on GPUs that give the same bits in every run."""
    # As `xla_flags.flag_value` reads them, which is of a room that this one does not import.
    flags = [one.partition("=") for one in env.get("XLA_FLAGS", "").split()]
    given = {name: value if sign else "true" for name, sign, value in flags}  # the last one counts
    names = ("deterministic_ops", "exclude_nondeterministic_ops")
    return any(given.get(f"--xla_gpu_{name}") in ("true", "1") for name in names)


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: SegmentIds | None,
    window: int,
) -> jax.Array:
    """`attention` by cuDNN, with the gradients that it has; arguments as there."""
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
