"""A list in a JSON file, value after value: such files may be larger than the memory."""

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

CHUNK = 1 << 16  # letters read at a time
_SPACE = re.compile(r"[ \t\r\n]*")


def list_items(file: TextIO, limit: int) -> Iterator[Any]:
    """The values of the list that a file holds, in the memory of one of them.

    Args:
      file: to read from where it stands.
      limit: letters of a value; a longer one is not waited for.

    Raises:
      ValueError: it is no JSON list, or is none from here on.
      RecursionError: a value is too deep.
    """
    decode = json.JSONDecoder().raw_decode
    text, at = "", 0

    def more() -> bool:
        nonlocal text, at
        # As much again, so that a long value is not begun too often.
        piece = file.read(max(CHUNK, len(text) - at))
        text, at = text[at:] + piece, 0
        return bool(piece)

    def following() -> str:
        """The next letter that is no white space; none at the end."""
        nonlocal at
        while True:
            space = _SPACE.match(text, at)
            assert space is not None  # it matches nothing, too
            at = space.end()
            if at < len(text) or not more():
                return text[at : at + 1]

    if following() != "[":
        raise ValueError("no list")
    at += 1
    if following() == "]":
        return
    while True:
        following()
        while True:
            try:
                value, at = decode(text, at)
                break
            except json.JSONDecodeError:
                if len(text) - at > limit or not more():
                    raise
        yield value
        mark = following()
        if mark not in (",", "]"):
            raise ValueError("neither a comma nor the end of the list")
        if mark == "]":
            return
        at += 1
