"""The LLaMA (arXiv:2302.13971) as pure functions in flax.linen.

Shapes are in the names; einsum letters are the same letters:
  B batch   T query position   S key position   D model   V vocab   L layers
  N query heads   K kv heads   G = N / K   H head dim   F ffn

Parameters are a plain nested dict of float32 arrays with Meta's names; the layers are stacked on a
leading axis L. The model does not depend on a mesh or on files: `constrain` only names dimensions.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from llama_jax.config import LoraConfig, ModelConfig
from llama_jax.model.attention import attention
from llama_jax.model.fusion import gradient_barrier
from llama_jax.model.initializers import normal
from llama_jax.model.linear import gated_silu, project_named, unembed, weight
from llama_jax.model.lora import Adapted
from llama_jax.model.rope import apply_rope, rope_tables
from llama_jax.parallel.sharding import constrain, reshard
from llama_jax.parameters import PARAMETERS, Table, shape_of

# Standard deviation of the initial weights, as in GPT-2 (the LLaMA paper gives no value).
# Projections back into the residual stream are scaled by 1 / sqrt(2 L), which keeps the variance
# of the stream near 1.
INIT_STD = 0.02


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, for decoding.

    Attributes:
      k: L B S K H (B S K H inside a layer), after RoPE.
      v: L B S K H.
      segment_ids: B S; 0 marks padding and empty slots.
      index: number of filled slots, the same for each row.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    index: jax.Array


def init_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
    """Returns an empty cache.

    Args:
      config: the model.
      batch: number of rows.
      length: tokens per row that fit into the cache.
    """
    shape = (config.n_layers, batch, length, config.n_kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, config.compute_dtype)
    segment_ids = jnp.zeros((batch, length), jnp.int32)
    return KVCache(k=zeros, v=zeros, segment_ids=segment_ids, index=jnp.zeros((), jnp.int32))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Computes x / rms(x) * scale over the last axis (RMSNorm, arXiv:1910.07467).

    Args:
      x: activations; the computation is in float32, the result has the dtype of `x`.
      scale: one factor per feature, of shape D.
      eps: added to the mean square.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale).astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with RoPE; several query heads may share a kv head.

    A variant overrides `heads` or `attend`; `attend` takes the arguments of `attention.attention`.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    attend: ClassVar[Any] = staticmethod(attention)

    @nn.nowrap
    def heads(self, name: str, x_BTNH: jax.Array) -> jax.Array:
        """Transforms queries (`name` is `q`) or keys (`k`) before RoPE; by default, not at all."""
        return x_BTNH

    @nn.compact
    def __call__(self, x_BTD, rope_BT1h, segment_ids_BT, cache):
        """Maps x_BTD to (x_BTD, new cache).

        The cache that goes in is (k, v, segment_ids, index), and the new one is (k, v); both are
        None without a cache.
        """
        c, dtype = self.config, self.config.compute_dtype
        project = functools.partial(project_named, self, self.lora)
        into, out_of = normal(INIT_STD), normal(INIT_STD / (2 * c.n_layers) ** 0.5)
        wq_DNH = weight(self, "wq", into, shape_of("DNH", c), dtype)
        wk_DKH = weight(self, "wk", into, shape_of("DKH", c), dtype)
        wv_DKH = weight(self, "wv", into, shape_of("DKH", c), dtype)
        wo_NHD = weight(self, "wo", out_of, shape_of("NHD", c), dtype)

        q_BTNH = self.heads("q", project("wq", "BTD,DNH->BTNH", x_BTD, wq_DNH))
        q_BTNH = apply_rope(q_BTNH, *rope_BT1h)
        k_BTKH = self.heads("k", project("wk", "BTD,DKH->BTKH", x_BTD, wk_DKH))
        k_BTKH = apply_rope(k_BTKH, *rope_BT1h)
        v_BTKH = project("wv", "BTD,DKH->BTKH", x_BTD, wv_DKH)
        q_BTNH = checkpoint_name(constrain(q_BTNH, "batch", "seq", "heads", "head_dim"), "q")
        k_BTKH = checkpoint_name(constrain(k_BTKH, "batch", "seq", "heads", "head_dim"), "k")
        v_BTKH = checkpoint_name(constrain(v_BTKH, "batch", "seq", "heads", "head_dim"), "v")

        if cache is None:
            keys, values, offset = k_BTKH, v_BTKH, 0
            segments = None if segment_ids_BT is None else (segment_ids_BT, segment_ids_BT)
        else:
            k_BSKH, v_BSKH, segment_ids_BS, offset = cache
            keys = jax.lax.dynamic_update_slice(k_BSKH, k_BTKH, (0, offset, 0, 0))
            values = jax.lax.dynamic_update_slice(v_BSKH, v_BTKH, (0, offset, 0, 0))
            segments = (segment_ids_BT, segment_ids_BS)
        out_BTNH = self.attend(
            q_BTNH,
            keys,
            values,
            q_offset=offset,
            segment_ids=segments,
            window=c.sliding_window,
            backend=c.attention,
            tile=c.attention_tile,
            backward=c.attention_backward,
        )
        out_BTD = project("wo", "BTNH,NHD->BTD", gradient_barrier(out_BTNH), wo_NHD)
        return out_BTD, (None if cache is None else (keys, values))


class SwiGLU(nn.Module):
    """The MLP w2(silu(w1 x) * w3 x), arXiv:2002.05202.

    A variant overrides `gated`, a function of w1 x and w3 x; one with GELU makes the MLP a GEGLU.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    gated: ClassVar[Any] = staticmethod(gated_silu)

    @nn.compact
    def __call__(self, x_BTD):
        """Maps x_BTD to x_BTD."""
        c, dtype = self.config, self.config.compute_dtype
        project = functools.partial(project_named, self, self.lora)
        into, out_of = normal(INIT_STD), normal(INIT_STD / (2 * c.n_layers) ** 0.5)
        w1_DF = weight(self, "w1", into, shape_of("DF", c), dtype)
        w3_DF = weight(self, "w3", into, shape_of("DF", c), dtype)
        w2_FD = weight(self, "w2", out_of, shape_of("FD", c), dtype)
        gate_BTF = checkpoint_name(project("w1", "BTD,DF->BTF", x_BTD, w1_DF), "mlp_gate")
        up_BTF = checkpoint_name(project("w3", "BTD,DF->BTF", x_BTD, w3_DF), "mlp_up")
        hidden_BTF = constrain(self.gated(gate_BTF, up_BTF), "batch", "seq", "ffn")
        return project("w2", "BTF,FD->BTD", hidden_BTF, w2_FD)


class Block(nn.Module):
    """A layer: x + attention(norm(x)), then x + mlp(norm(x)); the body of the layer scan.

    A variant replaces the class `attention` or `mlp`, or overrides `__call__`; see `Architecture`.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    # Class attributes and no fields, so that a plain assignment in a subclass overrides them.
    attention: ClassVar[Any] = Attention
    mlp: ClassVar[Any] = SwiGLU

    @nn.compact
    def __call__(self, x_BTD, layer_cache, rope_BT1h, segment_ids_BT, cache_segments):
        """Runs one step of the scan: returns the new carry x_BTD and the layer's new (k, v)."""
        c = self.config
        # With a cache, the sequence may be a single token, which devices cannot divide.
        residual = ("batch", "residual_seq" if layer_cache is None else "seq", "embed")
        whole = ("batch", "seq", "embed")
        x_BTD = checkpoint_name(x_BTD, "block_in")
        cache = None if layer_cache is None else (*layer_cache, *cache_segments)
        attn_norm_D = self.param("attn_norm", nn.initializers.ones, shape_of("D", c))
        normed_BTD = gradient_barrier(rms_norm(x_BTD, attn_norm_D, c.norm_eps))
        normed_BTD = reshard(normed_BTD, whole, residual)
        out_BTD, new_cache = self.attention(c, self.lora, name="attn")(
            normed_BTD, rope_BT1h, segment_ids_BT, cache
        )
        x_BTD = x_BTD + checkpoint_name(reshard(out_BTD, residual, whole), "attn_out")
        mlp_norm_D = self.param("mlp_norm", nn.initializers.ones, shape_of("D", c))
        normed_BTD = gradient_barrier(rms_norm(x_BTD, mlp_norm_D, c.norm_eps))
        normed_BTD = reshard(normed_BTD, whole, residual)
        out_BTD = self.mlp(c, self.lora, name="mlp")(normed_BTD)
        return x_BTD + reshard(out_BTD, residual, whole), new_cache


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """The LLaMA, or a researcher's variant of it, which needs no change to the plain model.

    Attributes:
      block: the module of a layer: a class with the fields of `Block` and the arguments of its
        `__call__`.
      parameters: the table with a row for each array, such as
        `{**PARAMETERS, **parameter_table(Parameter(...))}`.
    """

    block: Any = Block
    parameters: Table = dataclasses.field(default_factory=lambda: PARAMETERS)

    @property
    def name(self) -> str:
        """The name of the architecture in checkpoints: the block's class; empty for the LLaMA."""
        return "" if self.block is Block else f"{self.block.__module__}.{self.block.__qualname__}"


LLAMA = Architecture()


@struct.dataclass
class Variant:
    """Parameters of another architecture, which `forward` accepts in place of plain parameters.

    Attributes:
      params: the parameters, or `Adapted`.
      architecture: the architecture of these parameters.
    """

    params: Any
    architecture: Architecture = struct.field(pytree_node=False)


def _remat(block: Any, config: ModelConfig) -> Any:
    """Wraps the block so that the backward pass keeps only the values that `config.remat` names."""
    policies = jax.checkpoint_policies
    if config.remat == "none":
        return block
    if config.remat == "full":
        policy = policies.nothing_saveable
    elif config.remat == "dots":
        policy = policies.dots_with_no_batch_dims_saveable
    else:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=config.remat_names("save"),
            names_which_can_be_offloaded=config.remat_names("offload"),
            offload_src="device",
            offload_dst="pinned_host",
        )
    # Inside a scan prevent_cse is unnecessary, and it costs speed.
    return nn.remat(block, policy=policy, prevent_cse=False)


class Llama(nn.Module):
    """The decoder, from token ids to the last hidden state and the output matrix.

    The logits are `hidden_BTD @ head_DV`. The module does not compute them, because training never
    holds all of them at once (see `loss.py`).
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    block: Any = Block

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        lengths_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, KVCache | None]:
        """Runs all layers.

        Args:
          tokens_BT: token ids.
          positions_BT: position of each token in its document, for RoPE; default: 0..T-1, plus
            the number of filled slots of the cache.
          segment_ids_BT: id of each token's document; a token sees only tokens with its own id.
            Required with a cache, where 0 marks padding.
          cache: the result of an earlier call or of `init_cache`; None: no cache.
          lengths_B: see `rope_tables`.

        Returns:
          hidden_BTD (after the final norm) and head_DV, both in the compute dtype, and the new
          cache (None without one).
        """
        c = self.config
        embed_VD = self.param("embed", normal(INIT_STD), shape_of("VD", c))
        # The table is gathered over fsdp before the look-up. For a look-up in a table that is
        # sharded on both axes, XLA replicates the table ("involuntary full rematerialization").
        table_VD = constrain(embed_VD.astype(c.compute_dtype), "vocab", "embed")
        residual = ("batch", "residual_seq" if cache is None else "seq", "embed")
        x_BTD = constrain(jnp.take(table_VD, tokens_BT, axis=0), *residual)

        start = 0 if cache is None else cache.index
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]) + start, tokens_BT.shape)
        rope_BT1h = rope_tables(positions_BT, c, lengths_B)

        cache_segments: tuple[Any, ...] = ()
        if cache is not None:
            assert segment_ids_BT is not None, "a cache needs segment_ids"
            segment_ids_BS = jax.lax.dynamic_update_slice(
                cache.segment_ids, segment_ids_BT, (0, start)
            )
            cache_segments = (segment_ids_BS, start)
        layers = nn.scan(
            _remat(self.block, c),
            variable_axes={"params": 0, "adapters": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.n_layers,
            unroll=min(c.scan_unroll, c.n_layers),
        )(c, self.lora, name="layers")
        layer_cache = None if cache is None else (cache.k, cache.v)
        x_BTD, kv = layers(x_BTD, layer_cache, rope_BT1h, segment_ids_BT, cache_segments)

        final_norm_D = self.param("final_norm", nn.initializers.ones, shape_of("D", c))
        hidden_BTD = rms_norm(x_BTD, final_norm_D, c.norm_eps)
        hidden_BTD = reshard(hidden_BTD, ("batch", "seq", "embed"), residual)
        if c.tied_embeddings:
            head_DV = embed_VD.T.astype(c.compute_dtype)
        else:
            head_DV = self.param("lm_head", normal(INIT_STD), shape_of("DV", c))
            head_DV = head_DV.astype(c.compute_dtype)
        if cache is not None:
            index = cache.index + tokens_BT.shape[1]
            cache = KVCache(k=kv[0], v=kv[1], segment_ids=segment_ids_BS, index=index)
        return hidden_BTD, head_DV, cache


def init_params(
    config: ModelConfig, key: jax.Array, architecture: Architecture = LLAMA
) -> dict[str, Any]:
    """Makes random initial parameters in float32: a plain nested dict of 12 arrays (11 if tied).

    Args:
      config: the model.
      key: the key of the random numbers.
      architecture: the LLaMA, or the variant that the parameters are for.
    """
    # Parameters do not depend on the input, so two tokens are enough. Kernels take no sequence as
    # short as that, but `xla` does.
    config = dataclasses.replace(config, attention="xla")
    return Llama(config, None, architecture.block).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def forward(
    config: ModelConfig,
    params: Any,
    tokens_BT: jax.Array,
    *,
    positions_BT: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    cache: KVCache | None = None,
    lengths_B: jax.Array | None = None,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, KVCache | None]:
    """Runs `Llama.__call__` as a pure function of its parameters.

    Args:
      config: the model.
      params: plain parameters, `Adapted` (a base with adapters), or a `Variant`.
      tokens_BT: token ids; see `Llama.__call__` for this argument and the next four.
      positions_BT: position of each token in its document.
      segment_ids_BT: id of each token's document.
      cache: keys and values of earlier tokens.
      lengths_B: tokens of each row's sequence.
      dropout_key: the key for the dropout of adapters; None: no dropout.

    Returns:
      hidden_BTD, head_DV and the new cache (None without one).
    """
    architecture = LLAMA
    if isinstance(params, Variant):
        params, architecture = params.params, params.architecture
    adapted = isinstance(params, Adapted)
    variables = {"params": params.base if adapted else params}
    if adapted:
        variables["adapters"] = params.adapters
    out: Any = Llama(config, params.lora if adapted else None, architecture.block).apply(
        variables,
        tokens_BT,
        positions_BT=positions_BT,
        segment_ids_BT=segment_ids_BT,
        cache=cache,
        lengths_B=lengths_B,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    return out


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Computes next-token logits, for small inputs and comparisons.

    Args:
      config: the model.
      params: see `forward`.
      tokens_BT: token ids.

    Returns:
      B T V, float32.
    """
    hidden_BTD, head_DV, _ = forward(config, params, tokens_BT)
    return unembed(hidden_BTD, head_DV)
