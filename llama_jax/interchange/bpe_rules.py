"""The merge rules of a SentencePiece BPE model, in an order that gives the same ids.

SentencePiece has scores and no rules. It joins the two neighbours that form the piece with the
highest score, the leftmost two if scores are equal; any two symbols that form a piece can join. The
tokenizers library has a list of rules. It applies the earliest rule of the list first, everywhere
in a word, and two rules never have equal rank.

How a piece is assembled does not depend on the text around it. So exactly one rule makes a piece:
the rule that is applied last when the piece is encoded alone. A piece that
stays split when it is encoded alone is never made. Rules of different scores are sorted by score.
The order of rules of equal scores matters if they compete for a symbol; `_ordered` finds it.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from llama_jax.errors import UserError

Rule = tuple[str, str]


def split(text: str, scores: Mapping[str, float]) -> tuple[list[str], Rule | None]:
    """Splits a text without user-defined pieces into symbols, as SentencePiece does.

    Args:
      text: text with U+2581 in place of spaces.
      scores: scores of all pieces that characters can form.

    Returns:
      The symbols, and the rule that was applied last, or None.
    """
    symbols, rule = list(text), None
    while True:
        best, place = -math.inf, -1
        for at in range(len(symbols) - 1):
            score = scores.get(symbols[at] + symbols[at + 1])
            if score is not None and (score > best or place < 0):
                best, place = score, at
        if place < 0:
            return symbols, rule
        rule = symbols[place], symbols[place + 1]
        symbols[place : place + 2] = ["".join(rule)]


def rules(scores: Mapping[str, float], pieces: Iterable[str]) -> list[Rule]:
    """Returns the rules that make pieces of several characters, the earliest rule first.

    Args:
      scores: scores of all pieces that characters can form, in the order of their ids.
      pieces: those of them that contain no user-defined piece, so that they may come out whole.

    Raises:
      UserError: no order of rules gives the ids that SentencePiece gives.
    """
    made = {}
    for piece in pieces:
        if len(piece) > 1:
            symbols, rule = split(piece, scores)
            if len(symbols) == 1 and rule:
                made[piece] = rule
    classes: dict[float, list[str]] = defaultdict(list)
    for piece in made:
        classes[scores[piece]].append(piece)
    found = []
    competition = _Competition(made, scores, classes)
    for score in sorted(classes, reverse=True):
        members = classes[score]
        ordered = members if len(members) == 1 else _ordered(members, competition)
        found += [made[piece] for piece in ordered]
    return found


class _Competition:
    """Decides which pieces of equal score must be made before others.

    SentencePiece makes the leftmost of them first. A list of rules gives the same result if
    SentencePiece also applies the next rule of the list wherever that rule can be applied:
    1. No rule further left may take the left symbol of the next rule first. The rules that could do
       so are rules (L, R) with this symbol as R and the same or a higher score, once L is made.
       These rules, and the pieces that lead to L, come before the next rule. Exception: a piece
       that also leads to R, and can be made from the start, is made on the left before it is made
       on the right. When R exists, L does not wait for this piece.
    2. The next rule may enable rules of a higher score. These must not take a symbol on its left,
       which a rule further left might need. A rule that enables such rules comes last.
    """

    def __init__(
        self,
        made: Mapping[str, Rule],
        scores: Mapping[str, float],
        classes: Mapping[float, list[str]],
    ) -> None:
        self._made, self._scores = made, scores
        self._tied = {p for members in classes.values() if len(members) > 1 for p in members}
        self._by_right: dict[str, list[str]] = defaultdict(list)
        self._steps: dict[str, frozenset[str]] = {}
        self._lowest: dict[str, float] = {}
        self._last: set[str] = set()
        for piece, (_, right) in made.items():
            self._by_right[right].append(piece)
        for piece, (_, right) in made.items():
            lower = (step for step in self._steps_of(right) if scores[step] < scores[piece])
            self._last.update(lower)

    def _steps_of(self, symbol: str) -> frozenset[str]:
        """Returns the tied pieces that are made on the way to a symbol, including the symbol."""
        if symbol not in self._made:
            return frozenset()
        if symbol not in self._steps:
            left, right = self._made[symbol]
            own = {symbol} & self._tied
            self._steps[symbol] = self._steps_of(left) | self._steps_of(right) | own
        return self._steps[symbol]

    def _lowest_of(self, symbol: str) -> float:
        """Returns the lowest score on the way to a symbol, including its own."""
        if symbol not in self._made:
            return math.inf
        if symbol not in self._lowest:
            ways = map(self._lowest_of, self._made[symbol])
            self._lowest[symbol] = min(self._scores[symbol], *ways)
        return self._lowest[symbol]

    def _from_the_start(self, piece: str) -> bool:
        """Returns whether both symbols of a piece are made before any piece of its score."""
        return min(map(self._lowest_of, self._made[piece])) > self._scores[piece]

    def before(self, piece: str, members: list[str]) -> set[str]:
        """Returns those of `members`, the pieces of its score, that must be made before `piece`."""
        score, (left, _) = self._scores[piece], self._made[piece]
        leading = {step for step in self._steps_of(left) if self._from_the_start(step)}
        found = set()
        for rival in self._by_right[left]:
            if self._scores[rival] >= score:
                found |= {rival} | (self._steps_of(self._made[rival][0]) - leading)
        found |= set(members) if piece in self._last else set()
        return {step for step in found if self._scores[step] == score} - {piece}


def _ordered(members: list[str], competition: _Competition) -> list[str]:
    """Sorts pieces of one score: each after those that must precede it, otherwise by id.

    Raises:
      UserError: two pieces must precede each other.
    """
    waits = {piece: competition.before(piece, members) for piece in members}
    ids = {piece: number for number, piece in enumerate(members)}
    followers = defaultdict(list)
    for piece, others in waits.items():
        for other in others:
            followers[other].append(piece)
    ready = [ids[piece] for piece, others in waits.items() if not others]
    heapq.heapify(ready)
    found = []
    while ready:
        piece = members[heapq.heappop(ready)]
        found.append(piece)
        for follower in followers[piece]:
            waits[follower].discard(piece)
            if not waits[follower]:
                heapq.heappush(ready, ids[follower])
    if len(found) < len(members):
        stuck = [piece for piece in members if waits[piece]]
        raise UserError(
            f"it has pieces with equal scores, such as {stuck[0]!r} and {stuck[1]!r}: the leftmost "
            "in the text is made first, which merge rules cannot express"
        )
    return found
