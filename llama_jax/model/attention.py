"""Computes causal, grouped-query attention by one of a table of backends.

Shape letters as in llama.py. Every backend computes the same: none takes a mask that it cannot
honour. A new backend is a file with `obstacle` and `attend`, a row of `BACKENDS`, and a name that
configs accept (`config.ATTENTION_BACKENDS`).
"""

from collections.abc import Mapping
from typing import Protocol

import jax

from llama_jax.errors import UserError
from llama_jax.model import attention_cudnn, attention_splash, attention_triton, attention_xla
from llama_jax.model.attention_scores import Options, SegmentIds


class Backend(Protocol):
    """A module that computes attention of as many queries as keys."""

    def obstacle(self, q_BTNH: jax.Array, segment_ids: SegmentIds | None, options: Options) -> str:
        """Says why it cannot compute this here, and what would work; '' if it can.

        Args:
          q_BTNH: queries, of which only shape and dtype are read.
          segment_ids: of queries and keys.
          options: what else is asked for.
        """

    def attend(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        segment_ids: SegmentIds | None,
        options: Options,
    ) -> jax.Array:
        """Computes it.

        Args:
          q_BTNH: queries, and all arguments, as those of `attention`.
          k_BSKH: keys.
          v_BSKH: values.
          segment_ids: of queries and keys.
          options: what else is asked for.

        Returns:
          Values averaged per query, B T N H, in the dtype of `q_BTNH`.
        """


BACKENDS: Mapping[str, Backend] = {
    "xla": attention_xla,
    "splash": attention_splash,
    "cudnn": attention_cudnn,
    "triton": attention_triton,
}
AUTO = ("splash", "cudnn", "xla")  # `auto` takes the first without an obstacle


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
    """Computes softmax(q k^T / sqrt(H)) v; query t sees the keys s <= t + q_offset of its segment.

    N query heads share K key/value heads in groups of G = N / K (arXiv:2305.13245).

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      q_offset: position of the first query among the keys; non-zero when decoding with a cache.
      segment_ids: ids of shape (B, T) for queries and (B, S) for keys; tokens of different
        documents, or of a document and its padding, do not see each other.
      window: keys that a query sees back, itself included (sliding-window attention, Mistral,
        arXiv:2310.06825); 0: all.
      backend: a row of `BACKENDS`: `xla` everywhere; `splash`, a Pallas kernel on TPU; `cudnn` and
        `triton` (a Pallas kernel too) on NVIDIA GPUs; or `auto`, see `AUTO`. Decoding is always
        `xla`.
      tile: tokens of a tile of splash; 0: by the sequence length and the chip.
      backward: `split` or `fused` kernels for the gradients of splash; `auto`: as `tile`.

    Returns:
      Values averaged per query, B T N H, in the dtype of `q_BTNH`; softmax is done in float32.

    Raises:
      ValueError: an unknown backend.
      UserError: the backend cannot compute this here; the message says what would work.
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
