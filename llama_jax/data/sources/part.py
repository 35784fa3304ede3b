"""A part of a source, its documents, and a tally of what is skipped or changed in it."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from llama_jax.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a source, which one worker reads.

    Attributes:
      kind: `files` (whole files of plain text), `text` (a range of one large text file), `jsonl`,
        `json` (a list of records), `parquet` or `tfds`.
      paths: the files; for TFDS the name of the dataset.
      start: the first byte (text, jsonl), row group (parquet) or example (tfds).
      stop: one past the last, in the same unit; -1: the end of the file.
      size: bytes on disk, for the progress display.
    """

    kind: str
    paths: tuple[str, ...]
    start: int
    stop: int
    size: int


@dataclasses.dataclass(frozen=True)
class Example:
    """A tokenised document, ready for a shard.

    Attributes:
      ids: its tokens, int32.
      text_bytes: length of its text in UTF-8.
      key: decides whether the document is held out; copies of a document have the same key.
      counts: for each token, whether it counts in the loss as a target; None: all tokens count.
      answers: number of answers of a conversation that are not cut.
      unended: number of these answers that do not end in an end token.
    """

    ids: np.ndarray
    text_bytes: int
    key: bytes
    counts: np.ndarray | None = None
    answers: int = 0
    unended: int = 0


class Tally:
    """Counts of what was left out, skipped or changed in a source or in a part of it.

    Attributes:
      files: number of files of each kind that were listed so far.
      left_out: number of files and folders that are not read, by reason.
      skipped: number of documents that could not be used, by reason.
      changed: number of documents that were changed before use, by what was changed.
      first: the place where each reason occurred first.
      position: approximate number of bytes of the part that were read so far.
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
        """Counts a document that is changed before it is used."""
        self.changed[what] += 1
        self.first.setdefault(what, where)

    def noted(self, kind: str) -> dict[str, list[Any]]:
        """Returns `left_out`, `skipped` or `changed` as a manifest stores it.

        Args:
          kind: the name of the attribute.

        Returns:
          reason -> [count, place of the first].
        """
        return {why: [count, self.first[why]] for why, count in getattr(self, kind).items()}

    def lines(self, *kinds: str) -> list[str]:
        """Returns a line for each reason: how often it occurred, and where it occurred first.

        Args:
          *kinds: any of `left_out`, `skipped` and `changed`.
        """
        return [
            f"{kind.replace('_', ' ')}  {count:,} {reason}; the first: {first}"
            for kind in kinds
            for reason, (count, first) in sorted(self.noted(kind).items())
        ]

    def why_nothing(self) -> str:
        """Returns in one line what was skipped and left out, to explain why no text was read."""
        reasons = [
            f"{kind.replace('_', ' ')}: {count:,} {reason} (the first: {first})"
            for kind in ("skipped", "left_out")
            for reason, (count, first) in sorted(self.noted(kind).items())
        ]
        return ", ".join(reasons) or "it holds no document"

    def __str__(self) -> str:
        """Returns a line for each reason why something was skipped, changed or left out."""
        return "\n".join(self.lines("skipped", "changed", "left_out"))


def too_long(config: DataConfig) -> str:
    """Returns the reason for skipping a document of more than `max_document_bytes`."""
    return f"longer than {config.max_document_bytes:,} bytes"


def longest_json(config: DataConfig) -> int:
    """Returns how many bytes of JSON a document may take: escapes such as \\u00e9 need more."""
    return 6 * config.max_document_bytes + 1024


def decode_document(
    data: bytes | memoryview,
    where: str,
    config: DataConfig,
    tally: Tally,
    begins: bool = True,
) -> Iterator[str]:
    """Yields the text of a document, or counts in `tally` why it cannot be used.

    Args:
      data: the document in UTF-8.
      where: the place of the document, for the report.
      config: limits the length of a document.
      tally: receives the count.
      begins: remove a byte order mark at the beginning; False: keep it as a part of the text.
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
    """Yields the texts of a column, and counts in `tally` the values that cannot be used.

    Args:
      values: the values of the column; those that are neither str nor bytes are skipped.
      where: the place of the column, for the report.
      config: limits the length of a document.
      tally: receives the counts.
    """
    for number, value in enumerate(values):
        place = f"{where}, number {number}"
        if isinstance(value, str):
            if len(value) > config.max_document_bytes:  # avoids a copy of a huge value
                tally.skip(too_long(config), place)
                continue
            value = value.encode("utf-8", "surrogatepass")
        if isinstance(value, bytes | memoryview):
            yield from decode_document(value, place, config, tally)
        else:
            tally.skip(f"no text in field {config.text_field!r}", place)
