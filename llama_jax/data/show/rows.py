"""Rows of a batch as text for a terminal, with the ends of documents and the places of weight 0."""

import dataclasses
import itertools
import unicodedata
from collections.abc import Iterator

import numpy as np

from llama_jax.text.tokenizer import Tokenizer

Row = dict[str, np.ndarray]  # the arrays of one sequence by name, each of shape (T,)

BOS, EOS, TARGET, NEWLINE, CUT, TAB = "‹BOS›", "‹EOS›", "→", "↵", "⋮", "⇥"
COUNTS, WEIGHTLESS = "│", "░"  # between position and text
COLOURS = {"dim": "2", "bold": "1", "mark": "1;35", "target": "1;33", "title": "1;4"}
SEGMENT_COLOURS = ("36", "32", "33", "34", "35")  # documents take these in turn
LINES_AT_THE_END = 3  # lines to show of the end of a long document


@dataclasses.dataclass(frozen=True)
class Screen:
    """The properties of the terminal that shows rows.

    Attributes:
      width: characters in a line.
      lines: maximum number of lines to show of one document; 0: all.
      colour: True if escape codes may be printed.
    """

    width: int = 100
    lines: int = 12
    colour: bool = False

    def paint(self, text: str, colour: str) -> str:
        """Returns the text in a colour, or unchanged if the screen has no colours."""
        code = COLOURS.get(colour, colour)
        return f"\033[{code}m{text}\033[0m" if self.colour and text else text


@dataclasses.dataclass(frozen=True)
class Piece:
    """Adjacent positions of one document in a row; either all count in the loss, or none does.

    Attributes:
      start: the first position.
      stop: the position after the last one.
      target: the last target if it is not the next input of the row; otherwise None.
    """

    start: int
    stop: int
    target: int | None


def legend(packed: bool, screen: Screen, answers: bool = False) -> str:
    """Returns a line that explains the marks.

    Args:
      packed: True if rows are packed documents.
      screen: properties of the terminal.
      answers: True if rows are conversations.
    """
    gutter = "doc:position" if packed else "position"
    uncounted = "not in an answer, weight 0" if answers else "weight 0"
    parts = (
        *(f"{gutter} {COUNTS} text", f"{BOS}{EOS} begin, end"),
        *(f"{TARGET} only predicted", f"{WEIGHTLESS} {uncounted}", f"{NEWLINE} newline"),
        f"{CUT} left out",
    )
    return screen.paint("  ".join(parts), "dim")


def pieces(row: Row, bos_id: int) -> list[Piece]:
    """Cuts a row between documents, and between positions that count and that do not."""
    inputs, targets, counted = row["inputs"], row["targets"], _counted(row)
    cuts = (inputs[1:] == bos_id) | (counted[1:] != counted[:-1])
    segments = row.get("segment_ids", np.zeros_like(inputs))
    cuts |= segments[1:] != segments[:-1]
    if "positions" in row:
        cuts |= (np.diff(row["positions"]) != 1) & counted[1:]
    edges = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(inputs)]
    found = []
    for start, stop in itertools.pairwise(edges):
        last = int(targets[stop - 1])
        follows = (
            stop < len(inputs) and inputs[stop] == last and segments[stop] == segments[stop - 1]
        )
        predicted = row["weights"][stop - 1] > 0 and not follows
        found.append(Piece(start, stop, last if predicted else None))
    return found


def _counted(row: Row) -> np.ndarray:
    return row.get("counts", row["weights"]) > 0


def counts_of_inputs(row: Row) -> np.ndarray:
    """Returns 1 for each input that counts as the target of the position before it, otherwise 0.

    Weights belong to targets, but rows of conversations are shown with marks at the inputs.
    """
    counts = np.zeros_like(row["weights"])
    same = row["segment_ids"][1:] == row["segment_ids"][:-1]
    counts[1:] = row["weights"][:-1] * same
    return counts


def show_row(row: Row, tokenizer: Tokenizer, screen: Screen) -> Iterator[str]:
    """Yields the lines that show one row.

    Args:
      row: arrays of one sequence.
      tokenizer: decodes the tokens.
      screen: properties of the terminal.
    """
    n_tokens = len(row["inputs"])
    positions = row.get("positions", np.arange(n_tokens))
    digits = len(str(n_tokens - 1))
    for number, piece in enumerate(pieces(row, tokenizer.bos_id)):
        counted = bool(_counted(row)[piece.start])
        segment = int(row["segment_ids"][piece.start]) if "segment_ids" in row else None
        colour = SEGMENT_COLOURS[(number if segment is None else segment) % len(SEGMENT_COLOURS)]

        def gutter(at: int, segment: int | None = segment) -> str:
            return (f"{segment:>3}:" if segment is not None else "") + f"{positions[at]:>{digits}} "

        room = max(20, screen.width - len(gutter(piece.start)) - 2)
        bar = screen.paint(COUNTS, colour) if counted else WEIGHTLESS
        if not counted and not row["inputs"][piece.start : piece.stop].any():
            text = f"padding: {piece.stop - piece.start} positions of weight 0"
            yield screen.paint(f"{gutter(piece.start)}{bar} {text}", "dim")
            continue
        lines = _lines(row, piece, tokenizer, screen, room)
        kept = max(1, screen.lines - 1)  # one line says how much is left out
        cut = len(lines) - kept if 0 < screen.lines < len(lines) else 0
        last_kept = max(1, kept - LINES_AT_THE_END)
        for index, (at, text) in enumerate(lines):
            if cut and index == last_kept:
                tokens = lines[index + cut][0] - at
                left_out = f"{CUT} {cut:,} lines, {tokens:,} tokens"
                yield screen.paint(" " * len(gutter(at)) + left_out, "dim")
            if not cut or not last_kept <= index < last_kept + cut:
                yield f"{screen.paint(gutter(at), colour)}{bar} {text}"


def _lines(
    row: Row, piece: Piece, tokenizer: Tokenizer, screen: Screen, room: int
) -> list[tuple[int, str]]:
    """Returns the lines of a piece, each with the index of its first token."""
    lines: list[tuple[int, str]] = []
    begin, line, used = piece.start, "", 0
    for at, text, colour in _items(row, piece, tokenizer):
        if used and used + _width(text) > room:
            lines.append((begin, line))
            begin, line, used = at, "", 0
        line += screen.paint(text, colour) if colour else text
        used += _width(text)
        if text.endswith(NEWLINE):
            lines.append((begin, line))
            begin, line, used = min(at + 1, piece.stop - 1), "", 0
    if line:
        lines.append((begin, line))
    return lines


def _items(row: Row, piece: Piece, tokenizer: Tokenizer) -> Iterator[tuple[int, str, str]]:
    """Yields the index, the text and the colour of each token."""
    ids = row["inputs"][piece.start : piece.stop].tolist()
    marks = {tokenizer.bos_id: BOS, tokenizer.eos_id: EOS}
    for at, (token, text) in enumerate(zip(ids, tokenizer.texts(ids), strict=True), piece.start):
        if token in marks:
            yield at, marks[token], "mark"
            continue
        # One token may contain a line break with text after it.
        for part in text.splitlines(keepends=True):
            yield at, visible(part), ""
    if piece.target is not None:
        text = marks.get(piece.target) or visible(tokenizer.texts([piece.target])[0])
        yield piece.stop - 1, TARGET + text, "target"


def visible(text: str) -> str:
    """Replaces all unprintable characters of a text, since data may contain escape codes."""
    return "".join(
        {"\n": NEWLINE, "\t": TAB}.get(letter)
        or (letter if letter.isprintable() else letter.encode("unicode_escape").decode())
        for letter in text
    )


def _width(text: str) -> int:
    """Returns the number of terminal columns that a text takes."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )
