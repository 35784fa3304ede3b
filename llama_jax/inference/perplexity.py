"""Perplexity of texts per token, word and byte, and bits per byte, with a strided window."""

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llama_jax.config import DataConfig
from llama_jax.data.shards.layout import source_folders, unchecked_remark
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.sources.documents import read_source
from llama_jax.data.sources.listing import named_sources
from llama_jax.data.sources.part import Tally
from llama_jax.errors import UserError
from llama_jax.inference.loaded_model import InferenceModel
from llama_jax.inference.logprobs import Scorer, Span
from llama_jax.text.tokenizer import Tokenizer

# Number of batches whose spans are collected and sorted by length together.
BATCHES_AT_ONCE = 32
COLUMNS = {  # of the table: the result and its number format
    "documents": ",",
    "tokens": ",",
    "words": ",",
    "bytes": ",",
    "loss": ".4f",
    "token_perplexity": ",.3f",
    "word_perplexity": ",.3f",
    "byte_perplexity": ",.4f",
    "bits_per_byte": ".4f",
}
REPORT_SECONDS = 5.0  # time between two lines about the progress


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its tokens, without EOS; the first token is not scored."""

    tokens: Sequence[int]
    text: str


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over documents, from which all perplexities are computed.

    Attributes:
      nll: sum of -log p over all scored tokens, in nats.
      documents: number of scored documents.
      tokens: number of scored tokens: all except the first of each document (BOS, if it has one).
      words: number of words, separated by white space.
      bytes: number of bytes of the texts in UTF-8.
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
        """Computes loss per token, the three perplexities and bits per byte; includes the sums."""
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
    """Cuts tokens into spans of at most `context` inputs, each `stride` after the one before.

    Every token except the first is scored once. Tokens after the first window are scored with at
    least `context - stride` tokens before them, so a smaller stride gives more context and takes
    more time.

    Args:
      tokens: tokens of a document.
      context: largest number of inputs of a span.
      stride: distance between the starts of two spans, in tokens.

    Raises:
      UserError: the stride is not in 1..context.
    """
    if not 1 <= stride <= context:
        raise UserError(f"--stride must be in 1..{context}, the context, got {stride}")
    scored = 1  # all tokens before this index are scored, or need no score
    for begin in range(0, len(tokens) - 1, stride):
        end = min(begin + context + 1, len(tokens))
        yield Span(tokens[begin:end], end - scored)
        scored = end
        if end == len(tokens):
            return


def text_document(text: str, tokenizer: Tokenizer) -> Document:
    """Makes a document of a text, with BOS if the tokenizer adds it, and without EOS."""
    return Document(tokenizer.encode_text(text), text)


def shard_document(tokens: np.ndarray, tokenizer: Tokenizer) -> Document:
    """Makes a document of the tokens of a shard's document, which go from BOS to EOS."""
    ids = tokens[:-1].tolist()
    return Document(ids, tokenizer.decode(ids[1:]))


def perplexity(
    scorer: Scorer,
    documents: Iterable[Document],
    stride: int,
    progress: Callable[[int], Any] = lambda count: None,
) -> Totals:
    """Scores documents independently of each other; call it inside `jax.set_mesh`.

    Args:
      scorer: the model and its context.
      documents: the documents, read one by one.
      stride: see `windows`.
      progress: called with the number of tokens scored since the last call.

    Raises:
      UserError: the stride is larger than the context, or there is no document.
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


class Progress:
    """Prints to stderr how many tokens are scored, every `REPORT_SECONDS` and at the end."""

    def __init__(self) -> None:
        self._start = self._said = time.perf_counter()
        self._tokens = 0

    def __call__(self, tokens: int) -> None:
        """Counts newly scored tokens."""
        self._tokens += tokens
        now = time.perf_counter()
        if now - self._said >= REPORT_SECONDS:
            self._said = now
            self.say()

    def say(self) -> None:
        """Prints the count and the speed now."""
        speed = self._tokens / (time.perf_counter() - self._start)
        print(f"{self._tokens:,} tokens, {speed:,.0f} tokens/s", file=sys.stderr, flush=True)


def read_texts(source: str, field: str, model: InferenceModel) -> dict[str, Iterator[Document]]:
    """Returns the documents of each named source of `--text`, read when they are needed.

    Args:
      source: the value of `--text`, see `DataConfig.source`.
      field: field of the records that has the text.
      model: the model, for its tokenizer.

    Raises:
      UserError: a source is misspelt; during reading: a file is missing.
    """
    data = DataConfig(source=source, text_field=field)
    return {
        name: (text_document(text, model.tokenizer) for text in _texts(spec, data))
        for name, spec in named_sources(source).items()
    }


def _texts(source: str, data: DataConfig) -> Iterator[str]:
    """Yields the texts of a source, and prints at the end what was skipped."""
    tally, some = Tally(), False
    try:
        for text in read_source(source, data, tally):
            some = True
            yield text
    finally:  # also if the caller stops early; without any text, an error reports the skips
        if some and str(tally):
            print(tally, file=sys.stderr, flush=True)


def read_shards(folder: str, split: str, model: InferenceModel) -> dict[str, Iterator[Document]]:
    """Returns the documents of each source of prepared shards, read when they are needed.

    Args:
      folder: folder that `prepare` wrote.
      split: `train` or `validation`.
      model: the model, for its tokenizer.

    Raises:
      UserError: there are no shards, they are damaged, or they use another tokenizer.
    """
    found: dict[str, Iterator[Document]] = {}
    for name, path in source_folders(folder).items():
        data = TokenDataset.open(path, split)
        if data.tokenizer_sha256 != model.tokenizer.fingerprint:
            raise UserError(
                f"the shards in {path} use another tokenizer than the checkpoint {model.folder}"
            )
        if data.unchecked:
            remark = unchecked_remark([str(path)])
            print(f"warning: {remark}", file=sys.stderr, flush=True)
        found[name] = (shard_document(tokens, model.tokenizer) for tokens in data.documents())
    return found


def evaluate(
    model: InferenceModel,
    sources: dict[str, Iterator[Document]],
    *,
    stride: int,
    batch_size: int,
    limit: int | None,
) -> dict[str, dict[str, float]]:
    """Computes the results of each source; with several sources, also of `all` together.

    Args:
      model: the model.
      sources: documents of each source by name.
      stride: see `windows`.
      batch_size: spans per batch.
      limit: largest number of documents per source; None: all.

    Raises:
      UserError: see `perplexity`.
    """
    scorer = Scorer(model.config.model, model.params, model.context, batch_size)
    progress, totals = Progress(), {}
    with jax.set_mesh(model.mesh):
        for name, found in sources.items():
            some = itertools.islice(found, limit)
            totals[name or "text"] = perplexity(scorer, some, stride, progress)
    progress.say()
    if len(totals) > 1:
        totals["all"] = sum(totals.values(), Totals())
    return {name: total.results() for name, total in totals.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """Formats the results as a table."""
    rows = [["", *(name.replace("_", " ") for name in COLUMNS)]]
    rows += [
        [name, *(format(row[column], how) for column, how in COLUMNS.items())]
        for name, row in results.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def to_json(model: InferenceModel, stride: int, results: dict[str, dict[str, float]]) -> str:
    """Formats the results as JSON; numbers that are infinite or undefined become null.

    Args:
      model: the model.
      stride: stride of the window.
      results: see `evaluate`.
    """
    finite = {
        name: {key: value if math.isfinite(value) else None for key, value in row.items()}
        for name, row in results.items()
    }
    described = {
        "checkpoint": str(model.folder),
        "context": model.context,
        "stride": stride,
        "results": finite,
    }
    return json.dumps(described, indent=2, ensure_ascii=False)
