"""The splash backend of attention: the sparse flash kernel that comes with JAX, for TPUs.

Shape letters are those of llama.py.
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
LONG_SEQUENCE = 8192  # the shortest sequence, in tokens, for which the default tile is large
MOST_KEY_TILES = 8  # the largest number of key tiles for which `auto` uses the fused backward
ROOMY_CHIPS = ("TPU v6", "TPU7x")  # their compilers give a kernel memory for 2,048-token tiles


def obstacle(q_BTNH: jax.Array, segment_ids: SegmentIds | None, options: Options) -> str:
    """Explains why the kernel cannot run here, '' if it can; see `attention.Backend.obstacle`.

    A tile that does not divide the sequence is a mistake in the config, not an obstacle: `attend`
    raises an error then, because `auto` would silently select another backend.
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
    """A mixin for masks that returns fully visible and fully hidden tiles without comparisons.

    The kernel reads each tile of the mask when the kernel is made. With 100,000 tokens or more, it
    would take minutes to compare each query with each key.
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
    """A mask with which a query sees the last `window` keys, its own included."""

    def __init__(self, shape: tuple[int, int], window: int):
        super().__init__(shape, (window - 1, 0), 0)
        self.window = window


def _tiles(queries: int, keys: int, tile: int, backward: str) -> dict[str, Any]:
    """Returns the tile sizes of the splash kernels.

    The defaults follow published recipes (MaxText's for Llama 2 at T 4096 and Llama 3.1 at T 8192).
    Short sequences use tiles of 512 and two backward kernels. From 8,192 tokens on, attention is a
    large part of the step: tiles are 2,048 on chips whose vector memory holds them and 1,024 on
    others, and one fused backward kernel computes five products instead of seven. The fused kernel
    writes the gradient of the queries once per tile of keys, so with more than `MOST_KEY_TILES`
    tiles of keys the default is again two kernels.

    Args:
      queries: queries of a sequence on one device.
      keys: keys of the whole sequence.
      tile: tokens per tile; 0: the default.
      backward: `split`, `fused` or `auto`, the default.
    """
    if tile and queries % tile:
        raise UserError(
            f"model.attention=splash: the {queries} tokens of a device are not a multiple of "
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
    """Makes the kernel and its mask for `length` tokens and the heads of one device."""
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
    """Runs the kernel on the part of each sequence that one device has."""
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
    """Computes attention with the splash kernel on each device's heads.

    On a mesh with a `context` axis, each device takes an early and a late chunk of queries and
    gathers the keys (see `context_parallel`). The kernel skips blocks that the mask fully hides.

    Args:
      q_BTNH: queries; all arguments are those of `attention.Backend.attend`.
      k_BSKH: keys.
      v_BSKH: values.
      segment_ids: segment ids of queries and keys.
      options: window, tile and backward kernels.
      interpret: run the kernel in Python, on any platform (for tests).

    Raises:
      UserError: a device's part of the sequence is not a multiple of the tile.
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
    # The kernel itself names its result for remat policies; a second name would keep it twice.
    return out_BNTH.swapaxes(1, 2)
