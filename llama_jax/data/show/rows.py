"""Rows of a batch as text for a terminal: one document from another, and what weighs 0."""

import dataclasses
import itertools
import unicodedata
from collections.abc import Iterator

import numpy as np

from llama_jax.text.tokenizer import Tokenizer

Row = dict[str, np.ndarray]  # of one sequence: name -> T

BOS, EOS, TARGET, NEWLINE, CUT, TAB = "‹BOS›", "‹EOS›", "→", "↵", "⋮", "⇥"
COUNTS, WEIGHTLESS = "│", "░"  # between position and text
COLOURS = {"dim": "2", "bold": "1", "mark": "1;35", "target": "1;33", "title": "1;4"}
SEGMENT_COLOURS = ("36", "32", "33", "34", "35")  # one document after another
LINES_AT_THE_END = 3  # that are shown of a document that is cut


@dataclasses.dataclass(frozen=True)
class Screen:
    """Where rows are shown.

    Attributes:
      width: characters in a line.
      lines: of one document at most; 0: all.
      colour: whether escape codes may be printed.
    """

    width: int = 100
    lines: int = 12
    colour: bool = False

    def paint(self, text: str, colour: str) -> str:
        """The text in a colour, where there are any."""
        code = COLOURS.get(colour, colour)
        return f"\033[{code}m{text}\033[0m" if self.colour and text else text


@dataclasses.dataclass(frozen=True)
class Piece:
    """Positions of a row that belong together: of one document, and all counted or none.

    Attributes:
      start: first one.
      stop: after the last.
      target: the last target, where it is no input of the row.
    """

    start: int
    stop: int
    target: int | None


def legend(packed: bool, screen: Screen, answers: bool = False) -> str:
    """One line that explains the marks; `answers`: of conversations."""
    gutter = "doc:position" if packed else "position"
    uncounted = "not in an answer, weight 0" if answers else "weight 0"
    parts = (
        *(f"{gutter} {COUNTS} text", f"{BOS}{EOS} begin, end"),
        *(f"{TARGET} only predicted", f"{WEIGHTLESS} {uncounted}", f"{NEWLINE} newline"),
        f"{CUT} left out",
    )
    return screen.paint("  ".join(parts), "dim")


def pieces(row: Row, bos_id: int) -> list[Piece]:
    """Cuts a row where documents, or counted and uncounted positions, meet."""
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
    """Of each input whether it counts as the target of the position before it.

    Weights are those of targets; the rows of conversations are shown by what is learnt.
    """
    counts = np.zeros_like(row["weights"])
    same = row["segment_ids"][1:] == row["segment_ids"][:-1]
    counts[1:] = row["weights"][:-1] * same
    return counts


def show_row(row: Row, tokenizer: Tokenizer, screen: Screen) -> Iterator[str]:
    """The lines that show one row."""
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
        kept = max(1, screen.lines - 1)  # a line says what is left out
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
    """Screen lines of a piece, each with the index of its first token."""
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
    """What is written of each token: its index, text and colour."""
    ids = row["inputs"][piece.start : piece.stop].tolist()
    marks = {tokenizer.bos_id: BOS, tokenizer.eos_id: EOS}
    for at, (token, text) in enumerate(zip(ids, tokenizer.texts(ids), strict=True), piece.start):
        if token in marks:
            yield at, marks[token], "mark"
            continue
        # A piece of a tokenizer may hold a line break, with something after it.
        for part in text.splitlines(keepends=True):
            yield at, visible(part), ""
    if piece.target is not None:
        text = marks.get(piece.target) or visible(tokenizer.texts([piece.target])[0])
        yield piece.stop - 1, TARGET + text, "target"


def visible(text: str) -> str:
    """Text that does nothing to a terminal: data may hold escape codes."""
    return "".join(
        {"\n": NEWLINE, "\t": TAB}.get(letter)
        or (letter if letter.isprintable() else letter.encode("unicode_escape").decode())
        for letter in text
    )


def _width(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(
        0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
        for letter in text
    )
