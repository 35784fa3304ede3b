"""Decoding with a KV cache: batches of prompts of unequal lengths, on any mesh.

Long prompts enter the cache piece by piece, so that no array of prompt x prompt scores exists. The
cache of a model with a sliding window is little larger than the window.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError, as_float32
from llama_jax.model.linear import unembed
from llama_jax.model.llama import KVCache, forward, init_cache
from llama_jax.parallel.sharding import constrain, devices_along

PREFILL = 512  # number of tokens of each prompt that enter the cache at once
# Number of slots of the cache beyond the sliding window. Tokens behind the window are moved out
# when these slots are full, not at each token.
ROOM = 256


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings for drawing the next token.

    Attributes:
      max_tokens: largest number of new tokens.
      temperature: divides the logits; 0 selects the most likely token (greedy).
      top_k: draw only from the k most likely tokens; 0: from all.
      top_p: draw only from the most likely tokens that together have this probability (nucleus
        sampling, arXiv:1904.09751); 1: from all.
      seed: seed of the random draws.
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
        if self.temperature and not 0 < as_float32(self.temperature) < math.inf:
            raise UserError(
                f"temperature={self.temperature} is {as_float32(self.temperature)} in float32, the "
                "dtype in which it is used"
            )
        if not -(2**31) <= self.seed < 2**32:
            raise UserError(f"seed must be in [-2**31, 2**32), got {self.seed}")
        if max(self.top_k, self.max_tokens) >= 2**31:
            raise UserError("top_k and max_tokens must be less than 2**31")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")


def filter_logits(logits_BV: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets the logits of tokens outside top-k and top-p to -inf; keeps the most likely token.

    Args:
      logits_BV: logits, already divided by the temperature.
      top_k: see `Sampling`.
      top_p: see `Sampling`.
    """
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
    logits_BV: jax.Array, key: jax.Array, knobs: tuple[jax.Array, ...], n_ids: jax.Array
) -> jax.Array:
    """Draws a token for each row; never an id of `n_ids` or more, which only pads the model."""
    temperature, top_k, top_p = knobs
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < n_ids, logits_BV, -jnp.inf)
    scaled_BV = logits_BV / jnp.where(temperature > 0, temperature, 1.0)
    drawn_B = jax.random.categorical(key, filter_logits(scaled_BV, top_k, top_p))
    return jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


@struct.dataclass
class DecodeState:
    """The state of a batch of rows between two tokens.

    Attributes:
      cache: keys and values so far; rows are padded on the left.
      logits_BV: logits of the next token, float32.
      position_B: position of the next token in its row.
      done_B: whether the row has ended.
      step: number of tokens drawn so far.
    """

    cache: KVCache
    logits_BV: jax.Array
    position_B: jax.Array
    done_B: jax.Array
    step: jax.Array

    def constrained(self) -> "DecodeState":
        """Returns the state with fixed shardings, so that the next program takes it unchanged."""
        kv = (None, "batch", None, "heads", "head_dim")
        cache = dataclasses.replace(
            self.cache,
            k=constrain(self.cache.k, *kv),
            v=constrain(self.cache.v, *kv),
            segment_ids=constrain(self.cache.segment_ids, "batch", None),
            index=constrain(self.cache.index),
        )
        return DecodeState(
            cache=cache,
            logits_BV=constrain(self.logits_BV, "batch", None),
            position_B=constrain(self.position_B, "batch"),
            done_B=constrain(self.done_B, "batch"),
            step=constrain(self.step),
        )


def cache_slots(config: ModelConfig, width: int, max_tokens: int) -> int:
    """Returns the number of slots that a cache needs.

    Args:
      config: the model; with a sliding window, the cache does not hold all tokens.
      width: length of the padded prompts, in tokens.
      max_tokens: number of new tokens.
    """
    everything = width + max_tokens
    if not config.sliding_window:
        return everything
    return min(everything, config.sliding_window + max(ROOM, min(width, PREFILL)))


def _extend(
    config: ModelConfig,
    params: Any,
    cache: KVCache,
    *arrays: jax.Array,
    lengths_B: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Adds tokens to the cache, and returns the logits after the last token and the new cache.

    Args:
      config: the model.
      params: its parameters.
      cache: the cache so far.
      *arrays: tokens_BT, positions_BT and segment_ids_BT of the new tokens.
      lengths_B: tokens of each row's sequence, for RoPE that depends on it; None: the sequence ends
        with the new tokens. Keys in the cache are not rotated again, as in transformers.
    """
    tokens_BT, positions_BT, segment_ids_BT = arrays
    if config.sliding_window:
        full = cache.index + tokens_BT.shape[1] > cache.segment_ids.shape[1]
        forget = functools.partial(_forget, config.sliding_window)
        cache = jax.lax.cond(full, forget, lambda cache: cache, cache)
    hidden_BTD, head_DV, new_cache = forward(
        config,
        params,
        tokens_BT,
        positions_BT=positions_BT,
        segment_ids_BT=segment_ids_BT,
        cache=cache,
        lengths_B=lengths_B,
    )
    assert new_cache is not None
    return unembed(hidden_BTD[:, -1], head_DV), new_cache


def _forget(window: int, cache: KVCache) -> KVCache:
    """Moves the last `window` tokens to the front; the slots after them will be overwritten."""
    shift = cache.index - window
    return KVCache(
        k=jnp.roll(cache.k, -shift, axis=2),
        v=jnp.roll(cache.v, -shift, axis=2),
        segment_ids=jnp.roll(cache.segment_ids, -shift, axis=1),
        index=jnp.full_like(cache.index, window),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    config: ModelConfig, slots: int, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array
) -> DecodeState:
    """Fills a cache with left-padded prompts; marks rows of length 0 as ended."""
    batch, width = tokens_BT.shape
    pad_B1 = (width - lengths_B)[:, None]
    index_1T = jnp.arange(width)[None]
    arrays = (
        tokens_BT,
        jnp.maximum(index_1T - pad_B1, 0),
        (index_1T >= pad_B1).astype(jnp.int32),
    )
    start = DecodeState(
        cache=init_cache(config, batch, slots),
        logits_BV=jnp.zeros((batch, config.vocab_size), jnp.float32),
        position_B=lengths_B,
        done_B=lengths_B == 0,
        step=jnp.zeros((), jnp.int32),
    ).constrained()

    def body(state: DecodeState, piece: tuple[jax.Array, ...]) -> tuple[DecodeState, None]:
        logits_BV, cache = _extend(config, params, state.cache, *piece, lengths_B=lengths_B)
        return dataclasses.replace(state, cache=cache, logits_BV=logits_BV).constrained(), None

    size = min(width, PREFILL)  # both are powers of two
    pieces = tuple(x.reshape(batch, width // size, size).swapaxes(0, 1) for x in arrays)
    return jax.lax.scan(body, start, pieces)[0]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _decode(
    config: ModelConfig,
    count: int,
    params: Any,
    state: DecodeState,
    eos_ids: jax.Array,
    limit: jax.Array,
    key: jax.Array,
    knobs: tuple[jax.Array, ...],
    n_ids: jax.Array,
) -> tuple[jax.Array, DecodeState]:
    """Draws up to `count` tokens for each row, until all rows have ended or `limit` steps are done.

    Returns:
      New tokens, B x count, of which only the first (new `step` - old `step`) are valid; and the
      new state.
    """
    batch, begin = state.done_B.shape[0], state.step

    def more(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
        state, _ = carry
        return (state.step < jnp.minimum(limit, begin + count)) & ~jnp.all(state.done_B)

    def body(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        state, out_BT = carry
        # The key depends only on the step, so the number of steps per program changes no token.
        token_B = _draw(state.logits_BV, jax.random.fold_in(key, state.step), knobs, n_ids)
        arrays = (token_B[:, None], state.position_B[:, None], jnp.ones((batch, 1), jnp.int32))
        logits_BV, cache = _extend(config, params, state.cache, *arrays)
        new = DecodeState(
            cache=cache,
            logits_BV=logits_BV,
            position_B=state.position_B + 1,
            done_B=state.done_B | (token_B[:, None] == eos_ids).any(axis=1),
            step=state.step + 1,
        )
        return new.constrained(), out_BT.at[:, state.step - begin].set(token_B)

    out_BT = jnp.zeros((batch, count), jnp.int32)
    state, out_BT = jax.lax.while_loop(more, body, (state.constrained(), out_BT))
    return out_BT, state


def round_up(length: int) -> int:
    """Rounds up to a power of two (at least 16), so that few programs serve many lengths."""
    return max(16, 1 << (length - 1).bit_length())


def batch_multiple() -> int:
    """Returns the number of devices that the mesh divides a batch over; 1 without a mesh.

    Raises:
      UserError: the mesh divides the sequence, which decoding and scoring do not support.
    """
    context = devices_along("seq")
    if context > 1:
        raise UserError(
            f"the mesh has context={context}, which is for training; use data, fsdp and tensor here"
        )
    return devices_along("batch")


def check_prompts(prompts: Sequence[Sequence[int]], context: int) -> int:
    """Checks the prompts, and returns the length of the longest one, in tokens.

    Raises:
      UserError: there is no prompt, or a prompt is empty or leaves no room for a new token.
    """
    if not prompts:
        raise UserError("there is no prompt")
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise UserError("a prompt is empty; it needs at least the BOS token")
    if longest >= context:
        raise UserError(
            f"a prompt has {longest} tokens, but the model's context is {context}; "
            "shorten it to leave room for an answer"
        )
    return longest


def stream_tokens(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    context: int,
    eos_id: int | Sequence[int],
    n_ids: int | None = None,
    chunk: int = 1,
    rows: int = 1,
) -> Iterator[list[list[int]]]:
    """Continues a batch of prompts of unequal lengths, a few tokens at a time.

    Args:
      config: the model.
      params: its parameters.
      prompts: token ids of each prompt, at least one (BOS).
      sampling: how to draw tokens.
      context: longest sequence that the model supports, in tokens; generation stops there.
      eos_id: a row ends after this token, or after any of these tokens.
      n_ids: number of ids of the tokenizer. Larger ids of the model, which pad its vocabulary, are
        never drawn. None: the tokenizer has all ids of the model.
      chunk: tokens drawn by one program. A larger number needs fewer dispatches; the tokens are
        the same.
      rows: smallest number of rows of the program; rows without a prompt are padding.

    Yields:
      The next tokens of each row, with its EOS; an empty list for a row that has ended.

    Raises:
      UserError: see `check_prompts`.
    """
    longest = check_prompts(prompts, context)
    width, multiple = round_up(longest), batch_multiple()
    rows = -(-max(rows, len(prompts)) // multiple) * multiple
    tokens_BT, lengths_B = np.zeros((rows, width), np.int32), np.zeros((rows,), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = prompt
        lengths_B[row] = len(prompt)
    limit = min(sampling.max_tokens, context - longest)
    eos_ids = (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    fixed = (
        jnp.array(eos_ids, jnp.int32),
        jnp.int32(limit),
        jax.random.key(sampling.seed),
        (
            jnp.float32(sampling.temperature),
            jnp.int32(sampling.top_k),
            jnp.float32(sampling.top_p),
        ),
        jnp.int32(config.vocab_size if n_ids is None else n_ids),
    )
    slots = cache_slots(config, width, round_up(sampling.max_tokens))
    state = _prefill(config, slots, params, tokens_BT, lengths_B)
    done, step = [False] * len(prompts), 0
    while not all(done) and step < limit:
        out_BT, state = _decode(config, chunk, params, state, *fixed)
        rows_BT, reached = jax.device_get((out_BT, state.step))
        found = []
        for row in range(len(prompts)):
            new = [] if done[row] else rows_BT[row, : int(reached) - step].tolist()
            end = next((place for place, token in enumerate(new) if token in eos_ids), None)
            if end is not None:
                new, done[row] = new[: end + 1], True
            found.append(new)
        step = int(reached)
        yield found


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    context: int,
    eos_id: int | Sequence[int],
    n_ids: int | None = None,
) -> list[list[int]]:
    """Returns all new tokens of each row, drawn by one program.

    Args:
      config: the model; all arguments are those of `stream_tokens`.
      params: its parameters.
      prompts: token ids of each prompt, at least one (BOS).
      sampling: how to draw tokens.
      context: longest sequence that the model supports, in tokens.
      eos_id: a row ends after this token, or after any of these tokens.
      n_ids: number of ids of the tokenizer.

    Raises:
      UserError: see `check_prompts`.
    """
    parts = stream_tokens(
        config,
        params,
        prompts,
        sampling,
        context=context,
        eos_id=eos_id,
        n_ids=n_ids,
        chunk=round_up(sampling.max_tokens),
    )
    return [list(itertools.chain(*row)) for row in zip(*parts, strict=True)]
