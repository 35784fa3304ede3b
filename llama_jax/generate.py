"""Sampling with a KV cache; `python -m llama_jax.generate --checkpoint=DIR --prompt=TEXT`.

Example:
  python -m llama_jax.generate --checkpoint=runs/tiny --prompt='def main(' --max_tokens=100
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llama_jax import checkpoint as checkpoint_lib
from llama_jax import cli
from llama_jax.config import MeshConfig, ModelConfig
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import UserError
from llama_jax.mesh import make_mesh
from llama_jax.model import forward, init_cache
from llama_jax.sharding import param_shardings
from llama_jax.step import abstract_state


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      max_tokens: new tokens at most.
      temperature: divides the logits; 0 takes the most likely token (greedy).
      top_k: only the k most likely tokens; 0: all.
      top_p: only the most likely tokens that together have this probability (nucleus sampling,
        arXiv:1904.09751); 1: all.
      seed: of the random draws.
    """

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (all) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")


def filter_logits(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets the logits of tokens outside of top-k and top-p to -inf; the likeliest always stays."""
    vocab = logits_BV.shape[-1]
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    k = jnp.where(top_k > 0, top_k, vocab)
    keep_BV = (jnp.arange(vocab) < k) & (before_BV < top_p)
    keep_BV = keep_BV.at[:, 0].set(True)
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(keep_BV, rank_BV, axis=-1), logits_BV, -jnp.inf)


def _draw(
    logits_BV: jax.Array, key: jax.Array, knobs: tuple[jax.Array, jax.Array, jax.Array]
) -> jax.Array:
    temperature, top_k, top_p = knobs
    scaled_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
    drawn_B = jax.random.categorical(key, filter_logits(scaled_BV, top_k, top_p))
    return jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(
    config: ModelConfig,
    max_tokens: int,
    params: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    eos_id: jax.Array,
    limit: jax.Array,
    key: jax.Array,
    knobs: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Prefills the cache with left-padded prompts, then draws token after token in one loop.

    Returns:
      New tokens, B x max_tokens, and how many of each row count (EOS included).
    """
    batch, width = tokens_BT.shape
    pad_B1 = (width - lengths_B)[:, None]
    index_1T = jnp.arange(width)[None]
    hidden_BTD, head_DV, cache = forward(
        config,
        params,
        tokens_BT,
        positions_BT=jnp.maximum(index_1T - pad_B1, 0),
        segment_ids_BT=(index_1T >= pad_B1).astype(jnp.int32),
        cache=init_cache(config, batch, width + max_tokens),
    )

    def logits(hidden_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
        last_BD = hidden_BTD[:, -1]
        return jnp.einsum("BD,DV->BV", last_BD, head_DV, preferred_element_type=jnp.float32)

    def more(carry: tuple[Any, ...]) -> jax.Array:
        step, done_B, *_ = carry
        return (step < limit) & ~jnp.all(done_B)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, done_B, count_B, logits_BV, cache, out_BT = carry
        token_B = _draw(logits_BV, jax.random.fold_in(key, step), knobs)
        out_BT = out_BT.at[:, step].set(token_B)
        count_B = count_B + ~done_B
        done_B = done_B | (token_B == eos_id)
        hidden_B1D, head_DV, cache = forward(
            config,
            params,
            token_B[:, None],
            positions_BT=(lengths_B + step)[:, None],
            segment_ids_BT=jnp.ones((batch, 1), jnp.int32),
            cache=cache,
        )
        return step + 1, done_B, count_B, logits(hidden_B1D, head_DV), cache, out_BT

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch,), bool),
        jnp.zeros((batch,), jnp.int32),
        logits(hidden_BTD, head_DV),
        cache,
        jnp.zeros((batch, max_tokens), jnp.int32),
    )
    _, _, count_B, _, _, out_BT = jax.lax.while_loop(more, body, start)
    return out_BT, count_B


def _round_up(length: int) -> int:
    """To a power of two, so that prompts of many lengths share few compiled programs."""
    return max(16, 1 << (length - 1).bit_length())


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    context: int,
    eos_id: int,
) -> list[list[int]]:
    """Continues a batch of prompts of unequal lengths.

    Args:
      config: the model.
      params: its parameters.
      prompts: token ids, each at least one (BOS).
      sampling: how to draw.
      context: longest sequence the model was trained on, in tokens; generation stops there.
      eos_id: a row ends after this token.

    Returns:
      The new tokens of each row, EOS included where it came.

    Raises:
      UserError: no prompt, an empty one, or one that leaves no room for a new token.
    """
    if not prompts:
        raise UserError("there is no prompt")
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise UserError("a prompt is empty; begin it with the BOS token at least")
    if longest >= context:
        raise UserError(
            f"a prompt has {longest} tokens, but the model's context is {context}; "
            "shorten it to leave room for an answer"
        )
    width = _round_up(longest)
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = prompt
    knobs = (
        jnp.float32(sampling.temperature),
        jnp.int32(sampling.top_k),
        jnp.float32(sampling.top_p),
    )
    new_BT, count_B = _decode(
        config,
        _round_up(sampling.max_tokens),
        params,
        jnp.asarray(tokens_BT),
        jnp.asarray([len(prompt) for prompt in prompts], jnp.int32),
        jnp.int32(eos_id),
        jnp.int32(min(sampling.max_tokens, context - longest)),
        jax.random.key(sampling.seed),
        knobs,
    )
    rows, counts = jax.device_get((new_BT, count_B))
    return [row[:count].tolist() for row, count in zip(rows, counts, strict=True)]


def complete(
    config: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    context: int,
) -> list[str]:
    """Continues texts; returns each prompt with its continuation.

    Raises:
      UserError: as `generate`.
    """
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    new = generate(config, params, ids, sampling, context=context, eos_id=tokenizer.eos_id)
    special = (tokenizer.bos_id, tokenizer.eos_id)
    return [
        tokenizer.decode([token for token in (*prompt, *answer) if token not in special])
        for prompt, answer in zip(ids, new, strict=True)
    ]


def decoding_mesh(config: ModelConfig) -> jax.sharding.Mesh:
    """As many devices along `tensor` as heads, ffn and vocabulary divide over."""
    devices = jax.devices()
    tensor = math.gcd(len(devices), config.n_kv_heads, config.ffn_dim, config.vocab_size)
    return make_mesh(MeshConfig(fsdp=1, tensor=tensor), devices=devices[:tensor])


def main() -> None:
    """The command; flags are defined below."""
    if _CHECKPOINT.value is None:
        raise UserError("--checkpoint is missing; try --checkpoint=runs/tiny")
    sampling = Sampling(
        max_tokens=_MAX_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        seed=_SEED.value,
    )
    folder = checkpoint_lib.find_step(_CHECKPOINT.value)
    meta = checkpoint_lib.load_meta(folder)
    if not meta.tokenizer_model:
        raise UserError(f"{folder} was trained on synthetic data and has no tokenizer to read text")
    model = meta.config.model
    mesh = decoding_mesh(model)
    with jax.set_mesh(mesh):
        shardings = param_shardings(abstract_state(meta.config).params, mesh)
        params = checkpoint_lib.load_params(folder, meta.config, shardings)
        texts = complete(
            model,
            params,
            Tokenizer(meta.tokenizer_model),
            _PROMPT.value,
            sampling,
            context=meta.config.train.seq_len,
        )
    for number, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- {number + 1} ---")
        print(text)


if __name__ == "__main__":
    _CHECKPOINT = flags.DEFINE_string(
        "checkpoint", None, "Work directory (its newest step), or the folder of one step."
    )
    _PROMPT = flags.DEFINE_multi_string("prompt", [""], "Text to continue; repeat it for a batch.")
    _MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "New tokens at most.")
    _TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token (greedy).")
    _TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0: from all.")
    _TOP_P = flags.DEFINE_float(
        "top_p", 0.95, "Draw from the likeliest tokens of this probability."
    )
    _SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")
    cli.run(main, __doc__)
