"""Plain text to documents: a file is one, unless it is cut at a separator or is too large.

Where a large file is cut depends on the text alone, never on where reading began: so several
workers can read a file each from another place on, and cut it as one worker would.
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

STEP = 100_000  # bytes of a document that is cut out of a large file, about
CHUNK = 1 << 20  # bytes that are read at a time
# A line end, then lines of white space only: up to so many bytes, for a match is to be bounded.
_BLANK = re.compile(rb"\n[ \t\r\n]{0,200}\n")
_LONGEST_BLANK = 202
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[ntrf\\])")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "\\": "\\"}
BLANK_LINE = "cut out of a larger file at blank lines"
LINE_END = "cut out of a larger file at line ends, far from any blank line"
LETTER = "cut out of a larger file between two letters, far from any line end"
SEPARATOR = "cut out of a file at data.separator"
NO_SEPARATOR = "of a whole file, which does not hold data.separator"


def separator_of(config: DataConfig) -> str:
    r"""`data.separator` with its escapes read: \n, \t, \r, \f, \xHH, \uHHHH, and \\ for \."""

    def letter(match: re.Match[str]) -> str:
        code = match[1]
        return _ESCAPES[code] if code in _ESCAPES else chr(int(code[1:], 16))

    return _ESCAPE.sub(letter, config.separator)


def read_texts(part: Part, config: DataConfig, tally: Tally) -> Iterator[str]:
    """Streams the documents of files of plain text, or of a range of one."""
    position = tally.position
    for name in part.paths:
        path = epath.Path(name)
        with path.open("rb") as raw:
            opened = open_stream(raw)
            if format_by_name(path)[1] and not opened.compression:
                tally.skip(DAMAGED, name)  # nothing else in it says what it is
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
      file: in UTF-8, at its beginning; can be sought unless `start` is 0.
      start: first byte of the range.
      stop: where the range ends; -1: at the end of the file.
      where: the file, for the report.
      config: where to cut, and how long a document may be.
      tally: takes the counts.

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
    """The part of a stream that is in memory; positions are those of the stream."""

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
        """Whether no more than so many bytes are left."""
        self.load(self.start + size + 1)
        return self.ended and len(self.data) <= size

    def between(self, start: int, stop: int) -> bytes:
        """The bytes of a range."""
        return bytes(self.data[start - self.start : stop - self.start])

    def drop(self, stop: int) -> None:
        """Forgets the bytes up to a position."""
        del self.data[: stop - self.start]
        self.start = max(self.start, stop)

    def find(self, what: bytes, start: int, stop: int) -> int:
        """The first position of some bytes that lie within a range; -1 without."""
        at = self.data.find(what, start - self.start, max(0, stop - self.start))
        return at if at < 0 else at + self.start


@dataclasses.dataclass(frozen=True)
class _Cut:
    begin: int  # first byte
    data: bytes
    how: str  # at what kind of place it ends, for the report


class _Cuts:
    """Where a large text is cut, if nothing is said: once behind each multiple of `STEP`.

    That is at the end of the first blank line there; where none comes before a document would
    become too long, at the first end of a line; without any, between two letters. Several
    multiples may share a place. So each place is a function of the bytes around it.
    """

    def __init__(self, file: Any, start: int, limit: int) -> None:
        self._step = max(1, min(STEP, limit // 2))
        # No place is farther from its multiple, so no document is longer than the limit.
        self._reach = max(0, limit - self._step)
        self._first = max(0, start - self._reach - 4) // self._step
        self.window = _Window(file, self._first * self._step)
        self._blank: tuple[int, int] | None = None  # the last blank line that was found
        self._no_blank = 0  # none begins before this position, but that one

    def documents(self, start: int, stop: int) -> Iterator[_Cut]:
        """The documents that begin in a range, in order."""
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
        """Multiples and the places behind them, from the first multiple of the window on."""
        multiple = max(1, self._first)  # the beginning of the file is no cut
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
            return self.window.end, ""  # the rest is no document of its own
        line = self.window.find(b"\n", at, far)
        if line >= 0:
            return line + 1, LINE_END
        if left <= self._reach:
            return self.window.end, ""
        # A letter has at most three bytes behind its first.
        for position in range(at, min(at + 4, self.window.end)):
            if self.window.data[position - self.window.start] & 0xC0 != 0x80:
                return position, LETTER
        return at, LETTER

    def _next_blank(self, at: int) -> tuple[int, int] | None:
        """The first blank line that begins at a position or behind it, as far as is loaded."""
        if self._blank is not None and self._blank[0] >= at:
            return self._blank
        window = self.window
        match = _BLANK.search(window.data, max(at, self._no_blank) - window.start)
        # What is loaded later may end a blank line that begins here, or make it longer.
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
    """Documents between separators, as `bytes.split` finds them; those that hold nothing are not.

    One that is too long is counted without being held in memory.
    """
    window = _Window(file, _synchronised(file, start, separator))
    begin = 0 if start == 0 else -1
    at, long, cut = window.start, False, False

    def found(end: int) -> Iterator[str]:
        place = f"{where} at byte {begin}"
        if long:
            tally.skip(too_long(config), place)
            return
        data = window.between(begin, end)
        last = window.ended and end == window.end
        if cut and (not data or (last and not data.strip())):
            return  # between two separators in a row, or behind the last one
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
                yield from found(window.end)
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
            yield from found(place)
        at = place + len(separator)
        window.drop(at)
        begin, long = (at if at >= start else -1), False
        if 0 <= stop <= begin:
            return


def _synchronised(file: Any, start: int, separator: bytes) -> int:
    """A position from which on the same separators are found as from the beginning of the file.

    Separators such as two line ends may overlap, and then it matters where the search begins: at a
    position that none of them, chosen or not, goes across.
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
