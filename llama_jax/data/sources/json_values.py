"""Values in a JSON file, one after another: such files may be larger than the memory."""

import json
import re
from collections.abc import Collection, Iterator
from typing import Any, TextIO

CHUNK = 1 << 16  # letters read at a time
_SPACE = re.compile(r"[ \t\r\n]*")


class _Scanner:
    """The text of a file from where it was read to, in the memory of one value."""

    def __init__(self, file: TextIO, limit: int) -> None:
        self._file, self._limit = file, limit
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0

    def _more(self) -> bool:
        # As much again, so that a long value is not begun too often.
        piece = self._file.read(max(CHUNK, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def following(self) -> str:
        """The next letter that is not white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None  # it matches nothing, too
            self._at = space.end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        """Passes over the letter that `following` gave."""
        self._at += 1

    def value(self) -> Any:
        """The next value.

        Raises:
          ValueError: there is none, or it is longer than the limit.
          RecursionError: it is nested too deeply.
        """
        self.following()
        while True:
            try:
                value, at = self._decode(self._text, self._at)
            except json.JSONDecodeError:
                if len(self._text) - self._at > self._limit or not self._more():
                    raise
                continue
            # A number may go on in what is not read yet.
            if at == len(self._text) and not isinstance(value, dict | list | str) and self._more():
                continue
            self._at = at
            return value


def list_items(file: TextIO, limit: int) -> Iterator[Any]:
    """The values of the list that a file holds, in the memory of one of them.

    Lists that follow the first one count as its continuation.

    Args:
      file: to read from where it stands.
      limit: letters of a value; a longer one is not waited for.

    Raises:
      ValueError: it is no JSON list, or is none from here on.
      RecursionError: a value is too deep.
    """
    scanner = _Scanner(file, limit)
    if scanner.following() != "[":
        raise ValueError("no list")
    yield from _lists(scanner)


def values(file: TextIO, limit: int, fields: Collection[str] = ()) -> Iterator[Any]:
    """The items of the list in a file; where it has no list, the values that follow each other.

    Args:
      file: to read from where it stands.
      limit: letters of a value; a longer one is not waited for.
      fields: of which the first value must have one, if it is not in a list; empty: need not.

    Raises:
      ValueError: it is not JSON, or is none from here on.
      RecursionError: a value is too deep.
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
            raise ValueError("something else behind the list")
        scanner.skip()
        if scanner.following() == "]":
            scanner.skip()
            continue
        while True:
            yield scanner.value()
            mark = scanner.following()
            if mark not in (",", "]"):
                raise ValueError("neither a comma nor the end of the list")
            scanner.skip()
            if mark == "]":
                break
