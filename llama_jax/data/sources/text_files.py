"""Turns plain text into documents: one per file, unless a file has separators or is too large.

The cuts in a large file depend on the text alone, never on the byte where reading begins. So
several workers can read ranges of one file and cut it as one worker would.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.sources.decompression import Damaged, open_stream
from llama_jax.data.sources.file_kind import DAMAGED, format_by_name
from llama_jax.data.sources.part import Part, Tally, decode_document, too_long

STEP = 100_000  # approximate bytes of a document that is cut out of a large file
CHUNK = 1 << 20  # bytes that are read at a time
# A line end, then lines of white space only. The limit of 200 bytes bounds the length of a match.
_BLANK = re.compile(rb"\n[ \t\r\n]{0,200}\n")
_LONGEST_BLANK = 202
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[ntrf\\])")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "\\": "\\"}
BLANK_LINE = "cut out of a larger file at blank lines"
LINE_END = "cut out of a larger file at line ends, far from any blank line"
LETTER = "cut out of a larger file between two characters, far from any line end"
SEPARATOR = "cut out of a file at data.separator"
NO_SEPARATOR = "a whole file, because it does not contain data.separator"


def separator_of(config: DataConfig) -> str:
    r"""Returns `data.separator` with \n, \t, \r, \f, \xHH, \uHHHH and \\ replaced."""

    def letter(match: re.Match[str]) -> str:
        code = match[1]
        return _ESCAPES[code] if code in _ESCAPES else chr(int(code[1:], 16))

    return _ESCAPE.sub(letter, config.separator)


def read_texts(part: Part, config: DataConfig, tally: Tally) -> Iterator[str]:
    """Streams the documents of files of plain text, or of a range of one file.

    Args:
      part: what to read.
      config: where to cut, and how long a document may be.
      tally: receives the counts of documents that are skipped or changed.
    """
    position = tally.position
    for name in part.paths:
        path = epath.Path(name)
        with path.open("rb") as raw:
            opened = open_stream(raw)
            if format_by_name(path)[1] and not opened.compression:
                tally.skip(DAMAGED, name)  # named like a compressed file, but not compressed
                continue
            texts = text_documents(opened.file, part.start, part.stop, name, config, tally)
            try:
                for text in texts:
                    tally.position = position + raw.tell() - part.start
                    yield text
            except Damaged:
                tally.skip(DAMAGED, name)
            position += raw.tell() - part.start
            tally.position = position


def text_documents(
    file: Any, start: int, stop: int, where: str, config: DataConfig, tally: Tally
) -> Iterator[str]:
    """Streams the documents of a plain-text file that begin in a range of it.

    Args:
      file: UTF-8, at its beginning; must be seekable unless `start` is 0.
      start: first byte of the range.
      stop: one past the last byte of the range; -1: the end of the file.
      where: the name of the file, for the report.
      config: where to cut, and how long a document may be.
      tally: receives the counts of documents that are skipped or changed.

    Raises:
      Damaged: the file cannot be decompressed any further.
    """
    separator = separator_of(config).encode()
    if separator:
        yield from _at_separators(file, start, stop, separator, where, config, tally)
        return
    limit = config.max_document_bytes
    cuts = _Cuts(file, max(0, start), limit)
    if start == 0 and stop < 0 and cuts.window.is_at_most(limit):
        yield from decode_document(bytes(cuts.window.data), where, config, tally)
        return
    for cut in cuts.documents(start, stop):
        place = f"{where} at byte {cut.begin}"
        for text in decode_document(cut.data, place, config, tally, begins=cut.begin == 0):
            tally.change(cut.how, place)
            yield text


class _Window:
    """The part of a stream that is in memory. All positions are bytes from the stream's start."""

    def __init__(self, file: Any, start: int) -> None:
        if start:
            file.seek(start)
        self.start, self.ended = start, False
        self.data = bytearray()
        self._file = file

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def load(self, stop: int) -> None:
        """Reads up to a position, or to the end of the stream."""
        while not self.ended and self.end < stop:
            piece = self._file.read(min(CHUNK, stop - self.end))
            self.ended = not piece
            self.data += piece

    def is_at_most(self, size: int) -> bool:
        """Returns whether at most `size` bytes are left in the stream."""
        self.load(self.start + size + 1)
        return self.ended and len(self.data) <= size

    def between(self, start: int, stop: int) -> bytes:
        """Returns the bytes of a range."""
        return bytes(self.data[start - self.start : stop - self.start])

    def drop(self, stop: int) -> None:
        """Drops the bytes up to a position from memory."""
        del self.data[: stop - self.start]
        self.start = max(self.start, stop)

    def find(self, what: bytes, start: int, stop: int) -> int:
        """Returns the first position of some bytes within a range.

        Args:
          what: the bytes.
          start: first position of the range.
          stop: one past the last position of the range.

        Returns:
          The position of the first byte; -1: not found.
        """
        at = self.data.find(what, start - self.start, max(0, stop - self.start))
        return at if at < 0 else at + self.start


@dataclasses.dataclass(frozen=True)
class _Cut:
    begin: int  # first byte
    data: bytes
    how: str  # the kind of place where it is cut, for the report


class _Cuts:
    """The cuts of a large text without a separator: one behind each multiple of `STEP`.

    The cut is at the end of the first blank line behind the multiple. If no blank line comes before
    the document would become too long, the cut is at the first line end; without a line end, it is
    between two characters. Several multiples may share a cut. So each cut depends only on the bytes
    around it.
    """

    def __init__(self, file: Any, start: int, limit: int) -> None:
        self._step = max(1, min(STEP, limit // 2))
        # No cut is farther from its multiple than this, so no document is longer than the limit.
        self._reach = max(0, limit - self._step)
        self._first = max(0, start - self._reach - 4) // self._step
        self.window = _Window(file, self._first * self._step)
        self._blank: tuple[int, int] | None = None  # the last blank line that was found
        self._no_blank = 0  # no other blank line begins before this position

    def documents(self, start: int, stop: int) -> Iterator[_Cut]:
        """Yields the documents that begin in a range, in order."""
        begin, how = (0, "") if start == 0 else (-1, "")
        for at, place, kind in self._places():
            if begin >= 0 and place > begin:
                yield _Cut(begin, self.window.between(begin, place), kind or how)
                begin, how = place, kind
            elif begin < 0 and place >= start:
                begin, how = place, kind
            if 0 <= stop <= begin:
                return
            self.window.drop(min(at, begin) if begin >= 0 else at)
        if 0 <= begin < self.window.end:
            yield _Cut(begin, self.window.between(begin, self.window.end), how)

    def _places(self) -> Iterator[tuple[int, int, str]]:
        """Yields each multiple, and the place and kind of its cut, from the window's start on."""
        multiple = max(1, self._first)  # there is no cut at the beginning of the file
        while True:
            at = multiple * self._step
            self.window.load(at + self._reach + _LONGEST_BLANK)
            if self.window.end <= at:
                return
            yield (at, *self._place(at))
            multiple += 1

    def _place(self, at: int) -> tuple[int, str]:
        far = min(at + self._reach, self.window.end)
        blank = self._next_blank(at)
        if blank is not None and blank[1] <= far:
            return blank[1], BLANK_LINE
        left = self.window.end - at if self.window.ended else self._reach + 1
        if left <= self._step:
            return self.window.end, ""  # the rest is too short for another document
        line = self.window.find(b"\n", at, far)
        if line >= 0:
            return line + 1, LINE_END
        if left <= self._reach:
            return self.window.end, ""
        # In UTF-8, a character has at most three bytes after its first.
        for position in range(at, min(at + 4, self.window.end)):
            if self.window.data[position - self.window.start] & 0xC0 != 0x80:
                return position, LETTER
        return at, LETTER

    def _next_blank(self, at: int) -> tuple[int, int] | None:
        """Returns the first blank line in the window that begins at or after a position."""
        if self._blank is not None and self._blank[0] >= at:
            return self._blank
        window = self.window
        match = _BLANK.search(window.data, max(at, self._no_blank) - window.start)
        # Bytes that are loaded later may complete a blank line that begins here, or extend it.
        sure = window.end if window.ended else window.end - _LONGEST_BLANK
        if match is None or match.start() + window.start >= sure:
            self._blank, self._no_blank = None, max(self._no_blank, sure)
            return None
        self._blank = (match.start() + window.start, match.end() + window.start)
        return self._blank


def _at_separators(
    file: Any,
    start: int,
    stop: int,
    separator: bytes,
    where: str,
    config: DataConfig,
    tally: Tally,
) -> Iterator[str]:
    """Yields the documents between separators, as `bytes.split` does, without empty ones.

    A document that is too long is counted, but never held in memory.
    """
    window = _Window(file, _synchronised(file, start, separator))
    begin = 0 if start == 0 else -1
    at, long, cut = window.start, False, False

    def document(end: int) -> Iterator[str]:
        place = f"{where} at byte {begin}"
        if long:
            tally.skip(too_long(config), place)
            return
        data = window.between(begin, end)
        last = window.ended and end == window.end
        if cut and (not data or (last and not data.strip())):
            return  # nothing between two separators, or only white space after the last one
        for text in decode_document(data, place, config, tally):
            if cut:
                tally.change(SEPARATOR, place)
            elif start == 0 and stop < 0:
                tally.change(NO_SEPARATOR, where)
            yield text

    while True:
        place = window.find(separator, at, window.end)
        if place < 0 and window.ended:
            if begin >= 0:
                yield from document(window.end)
            return
        if place < 0:
            at = max(at, window.end - len(separator) + 1)
            long = begin >= 0 and at - begin > config.max_document_bytes
            if long or begin < 0:
                window.drop(at)
            window.load(window.end + CHUNK)
            continue
        cut = True
        if begin >= 0:
            yield from document(place)
        at = place + len(separator)
        window.drop(at)
        begin, long = (at if at >= start else -1), False
        if 0 <= stop <= begin:
            return


def _synchronised(file: Any, start: int, separator: bytes) -> int:
    """Returns a position from which a search finds the same separators as from the file's start.

    Occurrences of a separator such as two line ends may overlap. Then the result depends on where
    the search begins. This returns a position that no occurrence crosses.
    """
    at = max(0, start - len(separator))
    while at > 0:
        low = max(0, at - len(separator) + 1)
        file.seek(low)
        if separator not in file.read(at + len(separator) - 1 - low):
            break
        at -= 1
    file.seek(0) if start else None
    return at
