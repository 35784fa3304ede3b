"""Perplexity of text by a strided window: of tokens, words and bytes, and bits per byte."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import UserError
from llama_jax.scoring import Scorer, Span

# Documents wait until there are so many batches to sort by length.
BATCHES_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens, the first of which is not scored, without EOS, and the text that they are."""

    tokens: Sequence[int]
    text: str


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over documents, from which all perplexities follow.

    Attributes:
      nll: -log p of all tokens but the first of each document, in nats.
      documents: that were scored.
      tokens: that were scored: BOS is not, nor is the first token where there is no BOS.
      words: separated by white space.
      bytes: of UTF-8.
    """

    nll: float = 0.0
    documents: int = 0
    tokens: int = 0
    words: int = 0
    bytes: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Totals(*(left + right for left, right in zip(mine, others, strict=True)))

    def results(self) -> dict[str, float]:
        """The sums, loss per token, the three perplexities and bits per byte."""
        return {
            **dataclasses.asdict(self),
            "loss": _per(self.nll, self.tokens),
            "token_perplexity": _exp(_per(self.nll, self.tokens)),
            "word_perplexity": _exp(_per(self.nll, self.words)),
            "byte_perplexity": _exp(_per(self.nll, self.bytes)),
            "bits_per_byte": _per(self.nll, self.bytes) / math.log(2),
        }


def _per(total: float, count: int) -> float:
    return total / count if count else math.nan


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)


def windows(tokens: Sequence[int], context: int, stride: int) -> Iterator[Span]:
    """Spans of at most `context` inputs, each `stride` after the one before.

    Every token but the first is scored once. All but those of the first window have at least
    `context - stride` tokens before them: a smaller stride costs time and gives each more context.

    Raises:
      UserError: the stride is not in 1..context.
    """
    if not 1 <= stride <= context:
        raise UserError(f"--stride must be in 1..{context}, the context, got {stride}")
    scored = 1  # tokens before this one are
    for begin in range(0, len(tokens) - 1, stride):
        end = min(begin + context + 1, len(tokens))
        yield Span(tokens[begin:end], end - scored)
        scored = end
        if end == len(tokens):
            return


def text_document(text: str, tokenizer: Tokenizer) -> Document:
    """A text that begins with BOS if the tokenizer adds it, and does not end with EOS."""
    return Document(tokenizer.encode_text(text), text)


def shard_document(tokens: np.ndarray, tokenizer: Tokenizer) -> Document:
    """A document of a shard, from BOS to EOS."""
    ids = tokens[:-1].tolist()
    return Document(ids, tokenizer.decode(ids[1:]))


def perplexity(
    scorer: Scorer,
    documents: Iterable[Document],
    stride: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> Totals:
    """Scores documents, each by itself; call it inside `jax.set_mesh`.

    Args:
      scorer: the model, and its context.
      documents: read as they are needed.
      stride: of the window.
      progress: gets the number of tokens scored since the last call.

    Raises:
      UserError: a stride beyond the context, or there is no document.
    """
    totals = Totals()
    spans: list[Span] = []
    batches = BATCHES_AT_ONCE * scorer.batch_size

    def score() -> float:
        scores = scorer(spans)
        progress(sum(span.scored for span in spans))
        spans.clear()
        return -math.fsum(float(score.logprobs.sum(dtype="float64")) for score in scores)

    for document in documents:
        count = len(document.tokens) - 1
        if count < 1:
            continue
        words, size = len(document.text.split()), len(document.text.encode())
        totals += Totals(0.0, 1, count, words, size)
        for span in windows(document.tokens, scorer.context, stride):
            spans.append(span)
            if len(spans) == batches:
                totals += Totals(nll=score())
    totals += Totals(nll=score())
    if not totals.documents:
        raise UserError("there is no text to evaluate")
    return totals
