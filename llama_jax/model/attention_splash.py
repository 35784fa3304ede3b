"""Computes attention by the splash (sparse flash) kernel that comes with JAX, on TPUs.

Shape letters as in llama.py.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from llama_jax.errors import UserError
from llama_jax.model import context_parallel
from llama_jax.model.attention_scores import Options, SegmentIds
from llama_jax.parallel.mesh import device_kind, platform
from llama_jax.parallel.sharding import activation_spec, devices_along

LANES = 128  # the kernel works on multiples of this number of tokens
LONG_SEQUENCE = 8192  # tokens from which on splash takes large tiles
MOST_KEY_TILES = 8  # with which the fused backward kernel is the default
ROOMY_CHIPS = ("TPU v6", "TPU7x")  # whose compilers give a kernel room for tiles of 2,048 tokens


def obstacle(q_BTNH: jax.Array, segment_ids: SegmentIds | None, options: Options) -> str:
    """Says why the kernel cannot compute this here, and what would work; '' if it can.

    A tile that does not divide the sequence is a mistake in the config, not an obstacle: `attend`
    raises, where `auto` would silently take another backend.
    """
    length, context = q_BTNH.shape[1], devices_along("seq")
    if platform() != "tpu":
        return f"the splash kernel runs on TPUs, and this is a {platform()}; use xla"
    if length % (LANES * context):
        return (
            f"the splash kernel takes multiples of {LANES * context} tokens with "
            f"context={context}, not {length}; use xla"
        )
    return ""


class _Tiled:
    """Makes a mask answer at once for a tile that is seen whole, or not at all.

    The kernel asks for each tile when it is made, and to compare each query with each key takes
    minutes from 100,000 tokens on.
    """

    def __getitem__(self: Any, index: tuple[slice, slice]) -> np.ndarray:
        queries = self.q_sequence[index[0]]
        keys = np.arange(self.shape[1])[index[1]]
        first, last = queries.min(), queries.max()
        back = self.window or self.shape[1]
        if keys[-1] <= first and keys[0] > last - back:
            return np.broadcast_to(True, (len(queries), len(keys)))
        if keys[0] > last or keys[-1] <= first - back:
            return np.broadcast_to(False, (len(queries), len(keys)))
        return super().__getitem__(index)  # type: ignore[misc]


class _Causal(_Tiled, masks.CausalMask):
    window = 0


class _Window(_Tiled, masks.LocalMask):
    """A query sees the last `window` keys, itself included."""

    def __init__(self, shape: tuple[int, int], window: int):
        super().__init__(shape, (window - 1, 0), 0)
        self.window = window


def _tiles(queries: int, keys: int, tile: int, backward: str) -> dict[str, Any]:
    """Tile sizes of the splash kernels, where a device has so many queries and keys of a sequence.

    As published recipes have them (MaxText's for Llama 2 at T 4096 and Llama 3.1 at T 8192): tiles
    of 512 and two backward kernels for short sequences. From 8,192 tokens on, where attention is a
    large part of the step, tiles of 2,048 on chips whose vector memory holds them and of 1,024 on
    others, and one backward kernel, which makes five products instead of seven. That kernel writes
    the gradient of the queries once for each tile of keys, so two kernels take over again where
    there are many.
    """
    if tile and queries % tile:
        raise UserError(
            f"model.attention=splash: {queries} tokens of a device are no multiple of "
            f"model.attention_tile={tile}; use 0"
        )
    long = keys >= LONG_SEQUENCE
    if not tile:
        roomy = any(name in device_kind() for name in ROOMY_CHIPS)
        largest = (2048 if roomy else 1024) if long else 512
        sizes = (2048, 1024, 512, 256, LANES)
        tile = next(size for size in sizes if size <= largest and queries % size == 0)
    names = ["q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute"]
    fused = backward == "fused"
    if backward == "auto":
        fused = long and keys <= MOST_KEY_TILES * tile
    if not fused:
        names += ["q_dq", "kv_dq"]
    blocks: dict[str, Any] = {f"block_{name}": tile for name in names}
    return {**blocks, "use_fused_bwd_kernel": fused}


def _kernel(length: int, n_heads: int, options: Options, interpret: bool) -> Any:
    """Makes the kernel, with its mask, for `length` tokens and the heads of one device."""
    context = devices_along("seq")
    shape = (length, length)
    mask = _Window(shape, options.window) if options.window else _Causal(shape)
    if context > 1:
        mask.q_sequence = context_parallel.query_order(length, context).astype(np.int32)
    tiles = _tiles(length // context, length, options.tile, options.backward)
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * n_heads),
        block_sizes=kernels.BlockSizes(**tiles),
        head_shards=1,
        q_seq_shards=context,
        residual_checkpoint_name="attn_context",
        interpret=interpret,
    )


def _local(
    kernel: Any,
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments: SegmentIds | None,
) -> jax.Array:
    """Runs the kernel on each sequence of one device."""
    ids = None if segments is None else kernels.SegmentIds(*segments)
    return jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(
        q_BNTH, k_BKSH, v_BKSH, ids
    )


def _local_with_context(
    kernel: Any,
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments: SegmentIds | None,
) -> jax.Array:
    """Runs the kernel where each device has a part of each sequence."""
    exchange, gather = context_parallel.to_zigzag, context_parallel.gather
    if segments is not None:
        segments = (exchange(segments[0], 1), gather(segments[1], 1))
    keys, values = gather(k_BKSH, 2), gather(v_BKSH, 2)
    out_BNTH = _local(kernel, exchange(q_BNTH, 2), keys, values, segments)
    return context_parallel.from_zigzag(out_BNTH, 2)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids: SegmentIds | None,
    options: Options,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention by the splash kernel, on each device's heads.

    Under `context` each device takes an early and a late chunk of queries and gathers the keys, see
    `context_parallel`; what the mask hides in whole blocks is skipped.

    Args:
      q_BTNH: queries; all arguments are those of `attention.Backend`.
      k_BSKH: keys.
      v_BSKH: values.
      segment_ids: of queries and keys.
      options: window, tile and backward kernels.
      interpret: run the kernel in Python, on any platform (tests).

    Raises:
      UserError: a device's part of the sequence is no multiple of the tile.
    """
    mesh = jax.sharding.get_abstract_mesh()
    n_heads = q_BTNH.shape[2] // devices_along("heads")
    kernel = _kernel(q_BTNH.shape[1], n_heads, options, interpret)
    scale = 1 / math.sqrt(q_BTNH.shape[-1])
    q_BNTH = (q_BTNH * scale).astype(q_BTNH.dtype).swapaxes(1, 2)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    if mesh.empty:
        out_BNTH = _local(kernel, q_BNTH, k_BKSH, v_BKSH, segment_ids)
    else:
        batch, seq, heads, head_dim = activation_spec("batch", "seq", "heads", "head_dim")
        here, ids = P(batch, heads, seq, head_dim), P(batch, seq)
        kernel_spec = kernel.manual_sharding_spec(jax.NamedSharding(mesh, P(None, seq)))
        out_BNTH = jax.shard_map(
            _local_with_context if devices_along("seq") > 1 else _local,
            in_specs=(kernel_spec, here, here, here, None if segment_ids is None else (ids, ids)),
            out_specs=here,
            check_vma=False,
        )(kernel, q_BNTH, k_BKSH, v_BKSH, segment_ids)
    # What the kernel itself names is enough to keep; a second name would keep it twice.
    return out_BNTH.swapaxes(1, 2)
