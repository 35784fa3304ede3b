"""Which source each sample comes from: exact shares, as a function of the sample's number.

A sample is a sequence, a row of a batch. Shares are of tokens that count in the loss, and rows of
one source hold more of them than rows of another: packed rows have padding, rows of conversations
count only the answers. A source's share of the rows is its share of the tokens, divided by the mean
of counted tokens in its rows.
"""

import heapq
import math
import re
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


# A schedule repeats after this many samples at most.
MAX_PERIOD = 100_000
PERIOD = 10_000  # of a schedule of exact shares that do not fit into MAX_PERIOD
ROUNDING = Fraction(1, 10**6)  # by which given shares may miss a sum of 1
SMALLEST, LARGEST = Fraction(1, 10**12), Fraction(10**12)  # given share or weight


def parse_shares(text: str) -> dict[str, Fraction]:
    """Reads the shares of a mixture, as exact fractions that sum to 1.

    Args:
      text: `llama`, or a list such as `web=0.7,books=0.3`. Shares are decimals, fractions (`1/3`)
        or percentages (`70%`). Shares that sum to 1 up to rounding are scaled to 1. Two or more
        numbers of which one is 1 or more are weights, as in `web=3,books=2,code=1`.

    Raises:
      UserError: not such a list, a share that is not positive, or shares that do not sum to one.
    """
    text = text.strip()
    if text == "llama":
        return {name: Fraction(share) for name, share in LLAMA_SHARES.items()}
    items = re.split(r"\s*[,;\n]\s*", text)
    if len(items) > 2 and not items[-1]:  # `web=1,` alone lacks the rest
        items.pop()
    shares: dict[str, Fraction] = {}
    for item in items:
        name, share = _parse_share(item)
        if name in shares or not SMALLEST <= share <= LARGEST:
            why = "the name comes twice" if name in shares else "from 1e-12 to 1e12"
            raise UserError(
                f"data.mixture: {_shown(item)} must have a new name and a positive share ({why})"
            )
        shares[name] = share
    total = sum(shares.values(), Fraction(0))
    percent = "%" in text
    weights = not percent and len(shares) > 1 and any(share >= 1 for share in shares.values())
    if abs(total - 1) > ROUNDING and not weights:
        found = f"{float(100 * total):.15g}%" if percent else f"{float(total):.15g}"
        raise UserError(
            f"data.mixture: the shares sum to {found}, not to {'100%' if percent else 1}; write "
            "shares that do, as 0.7, 1/3 or 70%, or weights of 1 or more, as web=3,books=2,code=1"
        )
    return {name: share / total for name, share in shares.items()}


def _parse_share(item: str) -> tuple[str, Fraction]:
    """The name and the number of `NAME=SHARE`; 0 for a number that is far out of range.

    Raises:
      UserError: it is not of this form.
    """
    try:
        name, value = re.findall(r"^([^=:\s]+)\s*[=:\s]\s*(.+)$", item)[0]
        value = "".join(value.split())
        number = value.removesuffix("%")
        # Of 1e999999999, Fraction would write out the digits.
        fits = "/" in number or SMALLEST <= float(number) <= LARGEST
        share = Fraction(number) if fits else Fraction(0)
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"data.mixture: {_shown(item)} is not NAME=SHARE; write llama, or a list with commas "
            "such as web=0.7,books=0.3"
        ) from error
    if re.search(r"[/\\*?\[]", name):
        raise UserError(
            f"data.mixture: {_shown(name)} is a path, and shares are of names; give each source a "
            "name in data.source, as web=web/*.jsonl; books=books/*.txt"
        )
    return name, share / 100 if value.endswith("%") else share


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def shares_by_size(sizes: Mapping[str, int]) -> dict[str, Fraction]:
    """Shares in proportion to sizes: every source runs through its epochs at the same pace.

    Raises:
      UserError: all are empty.
    """
    total = sum(sizes.values())
    if not total:
        raise UserError("there is nothing to train on: no source has a whole sequence")
    return {name: Fraction(size, total) for name, size in sizes.items()}


def shares_of_samples(
    shares: Mapping[str, Fraction], means: Mapping[str, Fraction]
) -> dict[str, Fraction]:
    """Shares of samples that give shares of tokens.

    Args:
      shares: of tokens, summing to one.
      means: counted tokens in a sample of each source, on average; positive.
    """
    samples = {name: share / means[name] for name, share in shares.items()}
    total = sum(samples.values())
    return {name: value / total for name, value in samples.items()}


def _counts(shares: list[Fraction]) -> list[int]:
    """Samples of each source in one period: exact where the period allows, else largest remainder.

    Every source gets at least one, so that none is silently left out; but none for a share of 0.
    """
    period = min(MAX_PERIOD, _exact_period(shares))
    exact = [share * period for share in shares]
    counts = [max(1, int(value)) if value else 0 for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (int(exact[i]) - exact[i], i))
    for index in by_remainder[: max(0, period - sum(counts))]:
        counts[index] += 1
    return counts


def _exact_period(shares: list[Fraction]) -> int:
    return math.lcm(*(share.denominator for share in shares))


def _layout(counts: list[int]) -> np.ndarray:
    """Sources of the samples of one period, by Tijdeman's rule (see `Schedule`)."""
    period, n = sum(counts), len(counts)
    # In units of 1 / (2 S - 2) of a sample, all integers: slack is what the theorem allows.
    unit = max(1, 2 * n - 2)
    first, last = [], []  # sample of each draw: it is ahead of its share before, and due at
    for index, count in enumerate(counts):
        draw = np.arange(count)
        first.append(-(-period * (1 + draw * unit) // (unit * count)) - 1)
        last.append(-(-period * ((draw + 1) * unit - 1) // (unit * count)) * n + index)
    begins, keys = np.concatenate(first), np.concatenate(last)
    order = np.argsort(begins, kind="stable")
    begins, keys = begins[order].tolist(), keys[order].tolist()
    ready: list[int] = []
    source, at = [], 0
    for sample in range(period):
        while at < period and begins[at] <= sample:
            heapq.heappush(ready, keys[at])
            at += 1
        source.append(heapq.heappop(ready) % n)
    return np.asarray(source, np.int64)


def _divided(samples: int, weights: list[int]) -> list[int]:
    """The first `samples` samples, divided among sources in proportion to weights, exactly.

    The largest takes its part, rounded; the next its part of the remainder, and so on. With each
    sample more, one source has one more, because a part and its remainder never shrink.
    """
    counts = [0] * len(weights)
    rest = sum(weights)
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        if weights[index]:
            counts[index] = (2 * samples * weights[index] + rest) // (2 * rest)
            samples, rest = samples - counts[index], rest - weights[index]
    return counts


class Schedule:
    """A periodic assignment of samples to sources whose counts never stray from their shares.

    After any number n of samples, each of S sources has had its share of n to within
    1 - 1 / (2 S - 2) of a sample, and so in any window to within 2 - 1 / (S - 1): at each step the
    source with the earliest deadline among those that are not ahead is taken (Tijdeman's solution
    of the chairman assignment problem, 1980; no order can do better for all shares).

    Shares whose denominators need more than `MAX_PERIOD` samples are rounded to that; or, if they
    are to be exact, the few samples of each period that rounding down leaves over go to one source
    or another as `_divided` says. A source then has its share of n to within 2 + S / 4 samples.
    """

    def __init__(
        self,
        shares: Mapping[str, Fraction],
        means: Mapping[str, Fraction] | None = None,
        *,
        exact: bool = False,
    ) -> None:
        """Lays out one period.

        Args:
          shares: of tokens, summing to one.
          means: counted tokens in a sample of each source, on average; default: all the same.
          exact: whether shares are not rounded to `MAX_PERIOD` samples. If they are rounded, every
            source gets at least one sample in a period.
        """
        self.shares, self.names = dict(shares), list(shares)
        samples = list((shares_of_samples(shares, means) if means else shares).values())
        self._weights: list[int] = []  # of the sources, for what is left over
        if not exact or _exact_period(samples) <= MAX_PERIOD:
            counts = _counts(samples)
        else:
            common = _exact_period(samples)
            divided = [divmod(int(share * common) * PERIOD, common) for share in samples]
            counts = [count for count, _ in divided]
            counts.append(PERIOD - sum(counts))  # what is left over, as if of another source
            self._weights = [weight for _, weight in divided]
        self.period = sum(counts)
        self.counts = np.asarray(counts, np.uint64)
        self._source = _layout(counts)
        # The places in the period, by source: how many of a source come before one is a search.
        self._places = np.sort(self._source * self.period + np.arange(self.period))
        self._begin = np.cumsum([0, *counts[:-1]])

    def assign(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source index, and number of the draw from that source, of each sample (uint64)."""
        source = self._source[samples % np.uint64(self.period)]
        if not self._weights:
            return source, self._taken(samples, source)
        left = self._taken(samples, np.full(samples.shape, len(self.names))).tolist()
        had = {n: _divided(n, self._weights) for n in set(left)}
        for row in np.flatnonzero(source == len(self.names)).tolist():
            before, after = had[left[row]], _divided(left[row] + 1, self._weights)
            source[row] = next(index for index in range(len(after)) if after[index] > before[index])
        extra = [had[n][index] for n, index in zip(left, source.tolist(), strict=True)]
        return source, self._taken(samples, source) + np.asarray(extra, np.uint64)

    def _taken(self, samples: np.ndarray, source: np.ndarray) -> np.ndarray:
        """How many samples before each of these the layout gives to the source beside it."""
        block, position = np.divmod(samples, np.uint64(self.period))
        found = self._places.searchsorted(source * self.period + position.astype(np.int64))
        return block * self.counts[source] + (found - self._begin[source]).astype(np.uint64)

    def drawn(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples came from each source."""
        sources = np.arange(len(self.counts))
        counts = self._taken(np.full(sources.shape, samples, np.uint64), sources).tolist()
        if self._weights:
            extra = _divided(counts.pop(), self._weights)
            counts = [count + more for count, more in zip(counts, extra, strict=True)]
        return dict(zip(self.names, counts, strict=True))
