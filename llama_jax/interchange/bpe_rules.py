"""The merge rules of a SentencePiece BPE, in an order that gives its ids.

SentencePiece joins the two neighbours whose piece has the highest score, the leftmost of equal
ones, and knows no rules: any two symbols join whose letters make a piece. The tokenizers library
joins by a list of rules; the first of the list wins everywhere in a word, and equals do not exist.

What is joined within a piece does not depend on what stands around it. So one rule makes each
piece, the last one when the piece is encoded alone, and a piece that does not come out whole is
never made. Rules of different scores are in the order of their scores. The order of rules of equal
scores matters where they compete for a symbol, and `_ordered` finds it.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from llama_jax.errors import UserError

Rule = tuple[str, str]


def split(text: str, scores: Mapping[str, float]) -> tuple[list[str], Rule | None]:
    """Encodes a text without user-defined pieces as SentencePiece does.

    Args:
      text: with U+2581 for spaces.
      scores: of all pieces that letters can make.

    Returns:
      Its symbols, and the rule that was used last.
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
    """The rules that make pieces of several letters, the most urgent first.

    Args:
      scores: of all pieces that letters can make, in the order of their ids.
      pieces: those of them that may come out whole: no user-defined piece is within them.

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
    """Which pieces of an equal score must be made before others.

    SentencePiece makes the leftmost of them first, whichever it is. A list of rules gives the same
    result if, wherever its next rule applies, SentencePiece would come to apply it there, too:
    1. A rule to the left must not take its left symbol before. That is a rule (L, R) whose R is
       this symbol, of the same or a higher score, once L is made: it, and the pieces that lead to
       L, come first. But a piece that also leads to R, and can be made from the start, is made on
       the left before it is made on the right: L does not wait for it when R is there.
    2. Rules of a higher score that it sets off must not take a symbol on its left, which a rule
       further left might need: one that does comes last of all.
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
        """The tied pieces that are made on the way to a symbol, itself included."""
        if symbol not in self._made:
            return frozenset()
        if symbol not in self._steps:
            left, right = self._made[symbol]
            own = {symbol} & self._tied
            self._steps[symbol] = self._steps_of(left) | self._steps_of(right) | own
        return self._steps[symbol]

    def _lowest_of(self, symbol: str) -> float:
        """The lowest score on the way to a symbol, its own included."""
        if symbol not in self._made:
            return math.inf
        if symbol not in self._lowest:
            ways = map(self._lowest_of, self._made[symbol])
            self._lowest[symbol] = min(self._scores[symbol], *ways)
        return self._lowest[symbol]

    def _from_the_start(self, piece: str) -> bool:
        """Whether its two symbols are made before anything of its score is."""
        return min(map(self._lowest_of, self._made[piece])) > self._scores[piece]

    def before(self, piece: str, members: list[str]) -> set[str]:
        """The other members of its class that must be made before a piece."""
        score, (left, _) = self._scores[piece], self._made[piece]
        leading = {step for step in self._steps_of(left) if self._from_the_start(step)}
        found = set()
        for rival in self._by_right[left]:
            if self._scores[rival] >= score:
                found |= {rival} | (self._steps_of(self._made[rival][0]) - leading)
        found |= set(members) if piece in self._last else set()
        return {step for step in found if self._scores[step] == score} - {piece}


def _ordered(members: list[str], competition: _Competition) -> list[str]:
    """Pieces of one score, each behind those that must come before it, else by their ids.

    Raises:
      UserError: two of them must come before each other.
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
            f"of its pieces with equal scores, such as {stuck[0]!r} and {stuck[1]!r}, the "
            "leftmost in the text wins, and merge rules have no such order"
        )
    return found
