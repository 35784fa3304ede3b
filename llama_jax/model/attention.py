"""Causal, grouped-query attention with several backends.

Shape letters are those of llama.py. All backends compute the same function: a backend rejects a
mask that it does not support. To add a backend, write a module with `obstacle` and `attend`, add it
to `BACKENDS`, and add its name to `config.ATTENTION_BACKENDS`.
"""

from collections.abc import Mapping
from typing import Protocol

import jax

from llama_jax.errors import UserError
from llama_jax.model import attention_cudnn, attention_splash, attention_triton, attention_xla
from llama_jax.model.attention_scores import Options, SegmentIds


class Backend(Protocol):
    """A module that computes attention for equal numbers of queries and keys."""

    def obstacle(self, q_BTNH: jax.Array, segment_ids: SegmentIds | None, options: Options) -> str:
        """Explains why the backend cannot run with these arguments on this machine.

        Args:
          q_BTNH: queries, of which only shape and dtype are read.
          segment_ids: segment ids of queries and keys.
          options: the other arguments of `attention`.

        Returns:
          The reason and what would work instead; '' if the backend can run.
        """

    def attend(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        segment_ids: SegmentIds | None,
        options: Options,
    ) -> jax.Array:
        """Computes attention; see `attention`.

        Args:
          q_BTNH: queries.
          k_BSKH: keys.
          v_BSKH: values.
          segment_ids: segment ids of queries and keys.
          options: the other arguments of `attention`.

        Returns:
          The average of the values for each query, B T N H, in the dtype of `q_BTNH`.
        """


BACKENDS: Mapping[str, Backend] = {
    "xla": attention_xla,
    "splash": attention_splash,
    "cudnn": attention_cudnn,
    "triton": attention_triton,
}
AUTO = ("splash", "cudnn", "xla")  # `auto` selects the first one without an obstacle


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
    """Computes softmax(q k^T / sqrt(H)) v; query t sees keys s <= t + q_offset in its segment.

    N query heads share K key/value heads in groups of G = N / K (arXiv:2305.13245).

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      q_offset: position of the first query among the keys; non-zero when decoding with a cache.
      segment_ids: ids of shape (B, T) for queries and (B, S) for keys; a query sees only keys with
        its own id, so documents and padding are separate. None: one segment per row.
      window: number of keys that a query sees, its own included (sliding-window attention, Mistral,
        arXiv:2310.06825); 0: all.
      backend: `xla` on every platform; `splash`, a Pallas kernel on TPUs; `cudnn`, and `triton`, a
        Pallas kernel, on NVIDIA GPUs; or `auto`, see `AUTO`. Decoding always uses `xla`.
      tile: tokens per tile of the splash kernel; 0: chosen by sequence length and chip.
      backward: splash kernels for the gradients: `split`, `fused`, or `auto`: chosen by sequence
        length and tile.

    Returns:
      The average of the values for each query, B T N H, in the dtype of `q_BTNH`. The softmax is
      computed in float32.

    Raises:
      ValueError: the backend is unknown.
      UserError: the backend cannot run here; the message says what would work.
    """
    if not (isinstance(q_offset, int) and q_offset == 0 and q_BTNH.shape[1] == k_BSKH.shape[1]):
        return attention_xla.dense_attention(q_BTNH, k_BSKH, v_BSKH, q_offset, segment_ids, window)
    options = Options(window, tile, backward)
    if backend == "auto":
        backend = next(
            name for name in AUTO if not BACKENDS[name].obstacle(q_BTNH, segment_ids, options)
        )
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}")
    chosen = BACKENDS[backend]
    if obstacle := chosen.obstacle(q_BTNH, segment_ids, options):
        raise UserError(f"model.attention={backend}: {obstacle}")
    return chosen.attend(q_BTNH, k_BSKH, v_BSKH, segment_ids, options)
