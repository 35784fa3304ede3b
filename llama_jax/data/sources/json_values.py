"""The values of a JSON file, read one at a time: the file may be larger than the memory."""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, TextIO

CHUNK = 1 << 16  # characters read at a time
_SPACE = re.compile(r"[ \t\r\n]*")


class _Scanner:
    """A position in the text of a JSON file. Keeps about one value in memory."""

    def __init__(self, file: TextIO, limit: int) -> None:
        self._file, self._limit = file, limit
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0

    def _more(self) -> bool:
        # Doubles the text, so that a long value is not decoded from its start too often.
        piece = self._file.read(max(CHUNK, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def following(self) -> str:
        """Returns the next character that is not white space; empty at the end of the file."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None  # the pattern also matches the empty string
            self._at = space.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Skips the character that `following` returned."""
        self._at += 1

    def value(self) -> Any:
        """Reads the next value.

        Raises:
          ValueError: the text is not JSON, or the value is longer than the limit.
          RecursionError: the value is nested too deeply.
        """
        self.following()
        while True:
            try:
                value, at = self._decode(self._text, self._at)
            except json.JSONDecodeError:
                if len(self._text) - self._at > self._limit or not self._more():
                    raise
                continue
            # A number may continue in text that is not read yet.
            if at == len(self._text) and not isinstance(value, dict | list | str) and self._more():
                continue
            self._at = at
            return value


def list_items(file: TextIO, limit: int) -> Iterator[Any]:
    """Yields the items of the JSON list in a file, with about one of them in memory.

    Lists that follow the first one count as its continuation.

    Args:
      file: a text file, read from its current position.
      limit: maximum number of characters of one value.

    Raises:
      ValueError: the file does not hold a JSON list, the list is broken from here on, or a value is
        longer than the limit.
      RecursionError: a value is nested too deeply.
    """
    scanner = _Scanner(file, limit)
    if scanner.following() != "[":
        raise ValueError("not a JSON list")
    yield from _lists(scanner)


def values(file: TextIO, limit: int, fields: Collection[str] = ()) -> Iterator[Any]:
    """Yields the items of the JSON list in a file, or the values of a file without a list.

    Args:
      file: a text file, read from its current position.
      limit: maximum number of characters of one value.
      fields: in a file without a list, the first value must have one of these fields; empty: no
        check.

    Raises:
      ValueError: the file is not JSON, is broken from here on, or has a value longer than the
        limit.
      RecursionError: a value is nested too deeply.
    """
    scanner = _Scanner(file, limit)
    if scanner.following() == "[":
        yield from _lists(scanner)
        return
    while scanner.following():
        value = scanner.value()
        if fields and not (isinstance(value, dict) and value.keys() & set(fields)):
            raise ValueError("neither a list nor a record")
        fields = ()
        yield value


def _lists(scanner: _Scanner) -> Iterator[Any]:
    while mark := scanner.following():
        if mark != "[":
            raise ValueError("the list is followed by something that is not a list")
        scanner.skip()
        if scanner.following() == "]":
            scanner.skip()
            continue
        while True:
            yield scanner.value()
            mark = scanner.following()
            if mark not in (",", "]"):
                raise ValueError("a comma or the end of the list is missing")
            scanner.skip()
            if mark == "]":
                break
