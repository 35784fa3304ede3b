"""Perplexity of text by a strided window: of tokens, words and bytes, and bits per byte."""

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

# Documents wait until there are so many batches to sort by length.
BATCHES_AT_ONCE = 32
COLUMNS = {  # of the table: result -> format
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
REPORT_SECONDS = 5.0  # between two lines about the progress


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


class Progress:
    """Says on stderr, now and then and at the end, how many tokens are scored."""

    def __init__(self) -> None:
        self._start = self._said = time.perf_counter()
        self._tokens = 0

    def __call__(self, tokens: int) -> None:
        """Counts more tokens."""
        self._tokens += tokens
        now = time.perf_counter()
        if now - self._said >= REPORT_SECONDS:
            self._said = now
            self.say()

    def say(self) -> None:
        """Says it now."""
        speed = self._tokens / (time.perf_counter() - self._start)
        print(f"{self._tokens:,} tokens, {speed:,.0f} tokens/s", file=sys.stderr, flush=True)


def read_texts(source: str, field: str, model: InferenceModel) -> dict[str, Iterator[Document]]:
    """Documents of each named source of `--text`.

    Raises:
      UserError: a source is misspelt; when read: a file is missing.
    """
    data = DataConfig(source=source, text_field=field)
    return {
        name: (text_document(text, model.tokenizer) for text in _texts(spec, data))
        for name, spec in named_sources(source).items()
    }


def _texts(source: str, data: DataConfig) -> Iterator[str]:
    """Texts of a source; at the end it says what was skipped of it."""
    tally, some = Tally(), False
    try:
        for text in read_source(source, data, tally):
            some = True
            yield text
    finally:  # also where no more of them are asked for; without any, an error says so
        if some and str(tally):
            print(tally, file=sys.stderr, flush=True)


def read_shards(folder: str, split: str, model: InferenceModel) -> dict[str, Iterator[Document]]:
    """Documents of each source of prepared shards.

    Raises:
      UserError: there are no shards, they are damaged, or of another tokenizer.
    """
    found: dict[str, Iterator[Document]] = {}
    for name, path in source_folders(folder).items():
        data = TokenDataset.open(path, split)
        if data.tokenizer_sha256 != model.tokenizer.fingerprint:
            raise UserError(
                f"the shards in {path} are of another tokenizer than the checkpoint {model.folder}"
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
    """Results of each source, and of all together where there are several.

    Raises:
      UserError: as `perplexity`.
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
    """The results in columns."""
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
    """The results and what they are of; null for what is infinite or undefined."""
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
