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
      kind: `files` (whole files of plain text), `text` (a range of a large one), `jsonl`, `json` (a
        list of records), `parquet` or `tfds`.
      paths: the files; for TFDS the name of the dataset.
      start: first byte (text, jsonl), row group (parquet) or example (tfds).
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


class Tally:
    """What was met while a source was listed, or one pass over a part was read.

    Attributes:
      files: how many files of each kind the source has, as far as it is listed.
      left_out: files and folders that are not read, by reason.
      skipped: documents that could not be used, by reason.
      changed: documents that were not used as they are, by what was done to them.
      first: where the first of each reason was.
      position: bytes of the part read so far, about.
    """

    def __init__(self) -> None:
        self.files: collections.Counter[str] = collections.Counter()
        self.left_out: collections.Counter[str] = collections.Counter()
        self.skipped: collections.Counter[str] = collections.Counter()
        self.changed: collections.Counter[str] = collections.Counter()
        self.first: dict[str, str] = {}
        self.position = 0

    def leave_out(self, reason: str, where: str) -> None:
        """Counts a file or folder that is not read."""
        self.left_out[reason] += 1
        self.first.setdefault(reason, where)

    def skip(self, reason: str, where: str) -> None:
        """Counts a document that cannot be used."""
        self.skipped[reason] += 1
        self.first.setdefault(reason, where)

    def change(self, what: str, where: str) -> None:
        """Counts a document that is not used as it is."""
        self.changed[what] += 1
        self.first.setdefault(what, where)

    def noted(self, kind: str) -> dict[str, list[Any]]:
        """`left_out`, `skipped` or `changed` as a manifest has it: reason -> [count, first]."""
        return {why: [count, self.first[why]] for why, count in getattr(self, kind).items()}

    def lines(self, *kinds: str) -> list[str]:
        """Lines for the user: for each reason how often, and where the first was.

        Args:
          *kinds: of `left_out`, `skipped` and `changed`.
        """
        return [
            f"{kind.replace('_', ' ')}  {count:,} {reason}; the first: {first}"
            for kind in kinds
            for reason, (count, first) in sorted(self.noted(kind).items())
        ]

    def why_nothing(self) -> str:
        """Why there may be no text, in one line: all that was left out and skipped."""
        reasons = [
            f"{kind.replace('_', ' ')}: {count:,} {reason} (the first: {first})"
            for kind in ("skipped", "left_out")
            for reason, (count, first) in sorted(self.noted(kind).items())
        ]
        return ", ".join(reasons) or "it holds no document"

    def __str__(self) -> str:
        """What was not used, or not as it is: a line for each reason."""
        return "\n".join(self.lines("skipped", "changed", "left_out"))


def too_long(config: DataConfig) -> str:
    """Why a document of more than `max_document_bytes` is skipped."""
    return f"longer than {config.max_document_bytes:,} bytes"


def longest_json(config: DataConfig) -> int:
    """Bytes of JSON that a document may take: escapes such as \\u00e9 make it longer."""
    return 6 * config.max_document_bytes + 1024


def decode_document(
    data: bytes | memoryview,
    where: str,
    config: DataConfig,
    tally: Tally,
    begins: bool = True,
) -> Iterator[str]:
    """The text of a document's bytes, or nothing and a count of why.

    Args:
      data: UTF-8.
      where: the document, for the report.
      config: how long it may be.
      tally: takes the count.
      begins: whether a byte order mark at its beginning is one, and no part of the text.
    """
    if len(data) > config.max_document_bytes:
        tally.skip(too_long(config), where)
        return
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError:
        tally.skip("invalid UTF-8", where)
        return
    if begins:
        text = text.removeprefix("\ufeff")
    if not text.strip():
        tally.skip("empty", where)
        return
    yield text


def texts(values: Iterable[Any], where: str, config: DataConfig, tally: Tally) -> Iterator[str]:
    """The texts among the values of a column, with a count of those that are none."""
    for number, value in enumerate(values):
        place = f"{where}, number {number}"
        if isinstance(value, str):
            if len(value) > config.max_document_bytes:  # without a copy of a gigantic one
                tally.skip(too_long(config), place)
                continue
            value = value.encode("utf-8", "surrogatepass")
        if isinstance(value, bytes | memoryview):
            yield from decode_document(value, place, config, tally)
        else:
            tally.skip(f"no text in field {config.text_field!r}", place)
