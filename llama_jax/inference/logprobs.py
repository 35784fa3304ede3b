"""Log probabilities of given tokens, in batches of few shapes, without all logits at once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.inference.decode import batch_multiple, round_up
from llama_jax.model.linear import unembed
from llama_jax.model.llama import forward
from llama_jax.model.loss import from_chunks, n_chunks_of, to_chunks
from llama_jax.parallel.sharding import constrain, devices_along

CHUNK = 128  # number of positions whose logits exist at once


@functools.partial(jax.jit, static_argnums=0)
def token_logprobs(
    config: ModelConfig,
    params: Any,
    inputs_BT: jax.Array,
    targets_BT: jax.Array,
    lengths_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes log p(target | inputs up to its position) for each target.

    Args:
      config: the model.
      params: its parameters.
      inputs_BT: token ids, padded on the right, where no earlier token sees the padding.
      targets_BT: the token to score at each position.
      lengths_B: tokens of each row without padding, see `rope_tables`.

    Returns:
      Log probabilities in nats, float32, and whether the target is the most likely token; both B T.
    """
    hidden_BTD, head_DV, _ = forward(config, params, inputs_BT, lengths_B=lengths_B)
    head_DV = constrain(head_DV, "embed", "vocab")  # gathered once, not once per chunk

    def score(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, targets = chunk
        logits = constrain(unembed(hidden, head_DV), "batch", "seq", "vocab")
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        logprob = target - jax.nn.logsumexp(logits, axis=-1)
        return logprob, jnp.argmax(logits, axis=-1) == targets

    n_chunks = n_chunks_of(CHUNK, inputs_BT.shape[1])
    chunks = (to_chunks(hidden_BTD, n_chunks), to_chunks(targets_BT, n_chunks))
    logprob_CBT, greedy_CBT = jax.lax.map(score, chunks)
    return from_chunks(logprob_CBT), from_chunks(greedy_CBT)


@dataclasses.dataclass(frozen=True)
class Span:
    """A sequence of tokens, of which the last `scored` are scored, each given all before it."""

    tokens: Sequence[int]
    scored: int

    def __post_init__(self) -> None:
        if not 0 < self.scored < len(self.tokens):
            raise ValueError(
                f"{self.scored} of {len(self.tokens)} tokens cannot be scored; score at least one, "
                "and not the first"
            )


@dataclasses.dataclass(frozen=True)
class Score:
    """The scores of a span's scored tokens, in their order.

    Attributes:
      logprobs: log probability of each token, in nats, float32.
      greedy: whether each token was the most likely one.
    """

    logprobs: np.ndarray
    greedy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Scores spans in batches of one size, padded to lengths that are powers of two.

    Call it inside `jax.set_mesh`.

    Attributes:
      config: the model.
      params: its parameters.
      context: longest sequence that the model supports, in tokens.
      batch_size: spans per batch; rounded up to a multiple that the mesh divides.
    """

    config: ModelConfig
    params: Any
    context: int
    batch_size: int

    def __call__(
        self, spans: Sequence[Span], progress: Callable[[int], Any] = lambda count: None
    ) -> list[Score]:
        """Computes the score of each span.

        Args:
          spans: each has at most `context` + 1 tokens; the last token is only a target.
          progress: called with the number of spans done since the last call.

        Raises:
          ValueError: a span is longer.
          UserError: the mesh divides the sequence.
        """
        if spans and max(len(span.tokens) for span in spans) > self.context + 1:
            raise ValueError(f"a span has more than {self.context} + 1 tokens")
        multiple = batch_multiple()
        size = -(-self.batch_size // multiple) * multiple
        # The longest come first, so that a lack of memory shows at once.
        order = sorted(range(len(spans)), key=lambda index: -len(spans[index].tokens))
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        found: dict[int, Score] = {}
        waiting: list[tuple[list[int], Any]] = []

        def take() -> None:
            batch, arrays = waiting.pop(0)
            for index, logprobs, greedy in zip(batch, *jax.device_get(arrays), strict=False):
                stop = len(spans[index].tokens) - 1
                part = slice(stop - spans[index].scored, stop)
                found[index] = Score(logprobs[part], greedy[part])
            progress(len(batch))

        for batch in batches:
            padded = self._pad([spans[index].tokens for index in batch], size)
            arrays = token_logprobs(self.config, self.params, *padded)
            waiting.append((batch, arrays))
            if len(waiting) > 1:  # the next batch runs while the host reads this one
                take()
        while waiting:
            take()
        return [found[index] for index in range(len(spans))]

    def _pad(
        self, rows: list[Sequence[int]], size: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns padded inputs and targets, B T, and the lengths of the inputs, B."""
        width = round_up(max(map(len, rows)) - 1)
        parts = devices_along("residual_seq")
        width = -(-width // parts) * parts
        inputs_BT = np.zeros((size, width), np.int32)
        targets_BT = np.zeros((size, width), np.int32)
        lengths_B = np.zeros((size,), np.int32)
        for row, tokens in enumerate(rows):
            lengths_B[row] = len(tokens) - 1
            inputs_BT[row, : len(tokens) - 1] = tokens[:-1]
            targets_BT[row, : len(tokens) - 1] = tokens[1:]
        return inputs_BT, targets_BT, lengths_B
