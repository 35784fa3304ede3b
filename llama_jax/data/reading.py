"""A piece of a source, and what is met while it is read."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from llama_jax.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a source.

    Attributes:
      kind: `files` (whole files, one document each), `jsonl`, `json` (a list of records),
        `parquet` or `tfds`.
      paths: the files; for TFDS the name of the dataset.
      start: first byte (jsonl), row group (parquet) or example (tfds).
      stop: where it ends; -1: at the end.
      size: bytes on disk, for progress.
    """

    kind: str
    paths: tuple[str, ...]
    start: int
    stop: int
    size: int


@dataclasses.dataclass(frozen=True)
class Example:
    """A document as it goes into a shard.

    Attributes:
      ids: its tokens, int32.
      text_bytes: length of their text in UTF-8.
      key: decides whether it is held out; copies have the same.
      counts: of each token, whether it counts in the loss as a target; None: each does.
      answers: of a conversation, how many it has that are not cut.
      unended: how many of them end in no end token.
    """

    ids: np.ndarray
    text_bytes: int
    key: bytes
    counts: np.ndarray | None = None
    answers: int = 0
    unended: int = 0


class Reading:
    """What one pass over a part has met.

    Attributes:
      skipped: documents that could not be used, by reason.
      changed: documents that were not used as they are, by what was done to them.
      first: where the first of each reason was.
      position: bytes of the part read so far, about.
    """

    def __init__(self) -> None:
        self.skipped: collections.Counter[str] = collections.Counter()
        self.changed: collections.Counter[str] = collections.Counter()
        self.first: dict[str, str] = {}
        self.position = 0

    def skip(self, reason: str, where: str) -> None:
        """Counts a document that cannot be used."""
        self.skipped[reason] += 1
        self.first.setdefault(reason, where)

    def change(self, what: str, where: str) -> None:
        """Counts a document of which not all is used."""
        self.changed[what] += 1
        self.first.setdefault(what, where)

    def __str__(self) -> str:
        """What was skipped, a line for each reason."""
        return "\n".join(
            f"skipped  {count:,} {reason}; the first: {self.first[reason]}"
            for reason, count in sorted(self.skipped.items())
        )


def too_long(config: DataConfig) -> str:
    """Why a document of more than `max_document_bytes` is skipped."""
    return f"longer than {config.max_document_bytes:,} bytes"


def document(
    data: bytes | memoryview, where: str, config: DataConfig, reading: Reading
) -> Iterator[str]:
    """The text of a document's bytes, or nothing and a count of why."""
    if len(data) > config.max_document_bytes:
        reading.skip(too_long(config), where)
        return
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError:
        reading.skip("invalid UTF-8", where)
        return
    if not text.strip():
        reading.skip("empty", where)
        return
    yield text


def texts(values: Iterable[Any], where: str, config: DataConfig, reading: Reading) -> Iterator[str]:
    """The texts among the values of a column, with a count of those that are none."""
    for number, value in enumerate(values):
        place = f"{where}, number {number}"
        if isinstance(value, str):
            if len(value) > config.max_document_bytes:  # without a copy of a gigantic one
                reading.skip(too_long(config), place)
                continue
            value = value.encode("utf-8", "surrogatepass")
        if isinstance(value, bytes | memoryview):
            yield from document(value, place, config, reading)
        else:
            reading.skip(f"no text in field {config.text_field!r}", place)
