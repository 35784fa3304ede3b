"""Which source each sample comes from: exact shares, as a function of the sample's number.

Samples are sequences of one length, so shares of samples are shares of tokens.
"""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from llama_jax.errors import UserError

# Table 1 of the LLaMA paper (arXiv:2302.13971), which rounds the books' share to 4.5%.
LLAMA_SHARES = {
    "commoncrawl": "0.67",
    "c4": "0.15",
    "github": "0.045",
    "wikipedia": "0.045",
    "books": "0.045",
    "arxiv": "0.025",
    "stackexchange": "0.02",
}


def llama_sources(root: str) -> str:
    """A `data.source` of LLaMA's seven sources, each JSON lines in its own folder below `root`."""
    return "; ".join(f"{name}={root}/{name}/*.jsonl.zst" for name in LLAMA_SHARES)


# Shares are counted in this many samples at most; finer ones are rounded to it.
MAX_PERIOD = 100_000


def parse_shares(text: str) -> dict[str, Fraction]:
    """`web=0.7,books=0.3`, or `llama`, as exact fractions.

    Raises:
      UserError: not such a list, a share that is not positive, or shares that do not sum to one.
    """
    if text == "llama":
        return {name: Fraction(share) for name, share in LLAMA_SHARES.items()}
    shares: dict[str, Fraction] = {}
    for item in text.split(","):
        name, _, value = (piece.strip() for piece in item.partition("="))
        try:
            share = Fraction(value)
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"data.mixture: {item.strip()!r} is not NAME=SHARE") from error
        if not name or share <= 0 or name in shares:
            raise UserError(
                f"data.mixture: {item.strip()!r}: a new name and a positive share, please"
            )
        shares[name] = share
    total = sum(shares.values())
    if total != 1:
        raise UserError(f"data.mixture: the shares sum to {float(total):g}, not to 1")
    return shares


def shares_by_size(sizes: Mapping[str, int]) -> dict[str, Fraction]:
    """Shares in proportion to sizes: every source runs through its epochs at the same pace.

    Raises:
      UserError: all are empty.
    """
    total = sum(sizes.values())
    if not total:
        raise UserError("there is nothing to train on: no source has a whole sequence")
    return {name: Fraction(size, total) for name, size in sizes.items()}


def _counts(shares: list[Fraction]) -> list[int]:
    """Samples of each source in one period: exact where the period allows, else largest remainder.

    Every source gets at least one, so that none is silently left out.
    """
    period = min(MAX_PERIOD, math.lcm(*(share.denominator for share in shares)))
    exact = [share * period for share in shares]
    counts = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (int(exact[i]) - exact[i], i))
    for index in by_remainder[: max(0, period - sum(counts))]:
        counts[index] += 1
    return counts


class Schedule:
    """A periodic assignment of samples to sources whose counts never stray from their shares.

    After any number n of samples, each of S sources has had its share of n to within
    1 - 1 / (2 S - 2) of a sample, and so in any window to within 2 - 1 / (S - 1): at each step the
    source with the earliest deadline among those that are not ahead is taken (Tijdeman's solution
    of the chairman assignment problem, 1980; no order can do better for all shares).
    """

    def __init__(self, shares: Mapping[str, Fraction]) -> None:
        """Lays out one period.

        Args:
          shares: positive, summing to one.
        """
        counts = _counts(list(shares.values()))
        self.shares, self.names = dict(shares), list(shares)
        self.period = sum(counts)
        self.counts = np.asarray(counts, np.uint64)
        source = np.empty(self.period, np.int64)
        rank = np.empty(self.period, np.uint64)
        taken = [0] * len(counts)
        # In units of 1 / (2 S - 2) of a sample, all integers: slack is what the theorem allows.
        unit = max(1, 2 * len(counts) - 2)
        for n in range(self.period):
            best, best_deadline = -1, 0
            for index, count in enumerate(counts):
                lead = (count * (n + 1) - taken[index] * self.period) * unit
                if lead < self.period and len(counts) > 1:
                    continue  # ahead of its share
                deadline = -(-(((taken[index] + 1) * unit - 1) * self.period) // (unit * count))
                if best < 0 or deadline < best_deadline:
                    best, best_deadline = index, deadline
            source[n], rank[n] = best, taken[best]
            taken[best] += 1
        assert taken == counts
        self._source, self._rank = source, rank

    def assign(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source index, and number of the draw from that source, of each sample (uint64)."""
        block, position = np.divmod(samples, np.uint64(self.period))
        source = self._source[position]
        return source, block * self.counts[source] + self._rank[position]

    def drawn(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples came from each source."""
        blocks, rest = divmod(samples, self.period)
        partial = np.bincount(self._source[:rest], minlength=len(self.names))
        return {
            name: blocks * int(self.counts[index]) + int(partial[index])
            for index, name in enumerate(self.names)
        }
