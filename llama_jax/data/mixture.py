"""Exact shares of several sources: which source each sample comes from.

The source is a function of the number of the sample. A sample is a sequence, that is a row of a
batch. Shares are shares of the tokens that count in the loss. Rows of one source may hold more of
these than rows of another: packed rows have padding, and in conversations only the answers count.
Therefore the share of a source in the rows is proportional to its share of the tokens, divided by
the mean number of counted tokens in its rows.
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
    """Returns the `data.source` of LLaMA's seven sources: JSON lines, one folder each in `root`."""
    return "; ".join(f"{name}={root}/{name}/*.jsonl.zst" for name in LLAMA_SHARES)


# A schedule repeats after at most this many samples.
MAX_PERIOD = 100_000
PERIOD = 10_000  # samples in a period if exact shares do not fit into MAX_PERIOD
ROUNDING = Fraction(1, 10**6)  # the sum of given shares may differ from 1 by this much
SMALLEST, LARGEST = Fraction(1, 10**12), Fraction(10**12)  # limits of a given share or weight


def parse_shares(text: str) -> dict[str, Fraction]:
    """Reads the shares of a mixture, as exact fractions that sum to 1.

    Args:
      text: `llama`, or a list such as `web=0.7,books=0.3`. Shares are decimals, fractions (`1/3`)
        or percentages (`70%`). Shares whose sum differs from 1 only by rounding are scaled to 1.
        Two or more numbers are weights if one of them is 1 or more, as in `web=3,books=2,code=1`.

    Raises:
      UserError: the text is not such a list, a share is not positive, or the shares do not sum to
        1.
    """
    text = text.strip()
    if text == "llama":
        return {name: Fraction(share) for name, share in LLAMA_SHARES.items()}
    items = re.split(r"\s*[,;\n]\s*", text)
    if len(items) > 2 and not items[-1]:  # but `web=1,` is an incomplete list
        items.pop()
    shares: dict[str, Fraction] = {}
    for item in items:
        name, share = _parse_share(item)
        if name in shares or not SMALLEST <= share <= LARGEST:
            why = "the name occurs twice" if name in shares else "from 1e-12 to 1e12"
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
            "shares that do, such as 0.7, 1/3 or 70%, or weights of 1 or more, such as "
            "web=3,books=2,code=1"
        )
    return {name: share / total for name, share in shares.items()}


def _parse_share(item: str) -> tuple[str, Fraction]:
    """Returns the name and the number of `NAME=SHARE`; the number is 0 if it is far out of range.

    Raises:
      UserError: the item does not have this form.
    """
    try:
        name, value = re.findall(r"^([^=:\s]+)\s*[=:\s]\s*(.+)$", item)[0]
        value = "".join(value.split())
        number = value.removesuffix("%")
        # Fraction would write out all digits of 1e999999999.
        fits = "/" in number or SMALLEST <= float(number) <= LARGEST
        share = Fraction(number) if fits else Fraction(0)
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"data.mixture: {_shown(item)} is not NAME=SHARE; write llama, or a list with commas "
            "such as web=0.7,books=0.3"
        ) from error
    if re.search(r"[/\\*?\[]", name):
        raise UserError(
            f"data.mixture: {_shown(name)} is a path, but shares need names; give each source a "
            "name in data.source, such as web=web/*.jsonl; books=books/*.txt"
        )
    return name, share / 100 if value.endswith("%") else share


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def shares_by_size(sizes: Mapping[str, int]) -> dict[str, Fraction]:
    """Returns shares in proportion to sizes, so that all sources finish an epoch at the same time.

    Raises:
      UserError: all sources are empty.
    """
    total = sum(sizes.values())
    if not total:
        raise UserError("there is nothing to train on: no source has a whole sequence")
    return {name: Fraction(size, total) for name, size in sizes.items()}


def shares_of_samples(
    shares: Mapping[str, Fraction], means: Mapping[str, Fraction]
) -> dict[str, Fraction]:
    """Returns the shares of samples that result in given shares of tokens.

    Args:
      shares: shares of tokens, which sum to 1.
      means: mean number of counted tokens in a sample of each source; positive.
    """
    samples = {name: share / means[name] for name, share in shares.items()}
    total = sum(samples.values())
    return {name: value / total for name, value in samples.items()}


def _counts(shares: list[Fraction]) -> list[int]:
    """Returns the number of samples of each source in one period.

    The numbers are exact if `MAX_PERIOD` allows it, and otherwise rounded by largest remainder.
    A source with a share above 0 gets at least one sample, so that it is not silently left out.
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
    """Returns the source of each sample in one period, by Tijdeman's rule (see `Schedule`)."""
    period, n = sum(counts), len(counts)
    # In units of 1 / (2 S - 2) of a sample, the bounds of the theorem are integers.
    unit = max(1, 2 * n - 2)
    # For each draw: the first sample at which it is not ahead of its share, and its deadline.
    first, last = [], []
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
    """Divides the first `samples` samples among the sources, in proportion to integer weights.

    The source with the largest weight gets its rounded part, the next one its rounded part of the
    remainder, and so on. A part and its remainder never shrink when `samples` grows: with one more
    sample, exactly one source has one more.
    """
    counts = [0] * len(weights)
    rest = sum(weights)
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        if weights[index]:
            counts[index] = (2 * samples * weights[index] + rest) // (2 * rest)
            samples, rest = samples - counts[index], rest - weights[index]
    return counts


class Schedule:
    """A periodic assignment of samples to sources whose counts stay close to their shares.

    After any number n of samples, the count of each of S sources differs from its share of n by at
    most 1 - 1 / (2 S - 2) samples, and so in any window by at most 2 - 1 / (S - 1). Each sample
    goes to the source with the earliest deadline among those that are not ahead of their share
    (Tijdeman's solution of the chairman assignment problem, 1980; no order has a smaller bound for
    all shares).

    Shares whose denominators need more than `MAX_PERIOD` samples are rounded to that period. If the
    shares must be exact, the counts of each period are rounded down instead, and `_divided` assigns
    the few remaining samples. The count of a source then differs from its share of n by at most
    2 + S / 4 samples.
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
          shares: shares of tokens, which sum to 1.
          means: mean number of counted tokens in a sample of each source; default: the same for
            all sources.
          exact: True keeps the shares exact. False rounds them to `MAX_PERIOD` samples, with at
            least one sample of each source in a period.
        """
        self.shares, self.names = dict(shares), list(shares)
        samples = list((shares_of_samples(shares, means) if means else shares).values())
        self._weights: list[int] = []  # by which the remaining samples of a period are divided
        if not exact or _exact_period(samples) <= MAX_PERIOD:
            counts = _counts(samples)
        else:
            common = _exact_period(samples)
            divided = [divmod(int(share * common) * PERIOD, common) for share in samples]
            counts = [count for count, _ in divided]
            counts.append(PERIOD - sum(counts))  # the remaining samples, as one more source
            self._weights = [weight for _, weight in divided]
        self.period = sum(counts)
        self.counts = np.asarray(counts, np.uint64)
        self._source = _layout(counts)
        # Places in the period, sorted by source: a binary search counts those before a sample.
        self._places = np.sort(self._source * self.period + np.arange(self.period))
        self._begin = np.cumsum([0, *counts[:-1]])

    def assign(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the index of the source, and the number of the draw from it, for each sample.

        Args:
          samples: numbers of samples, uint64.
        """
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
        """Counts the samples before `samples[i]` that the layout gives to source `source[i]`."""
        block, position = np.divmod(samples, np.uint64(self.period))
        found = self._places.searchsorted(source * self.period + position.astype(np.int64))
        return block * self.counts[source] + (found - self._begin[source]).astype(np.uint64)

    def drawn(self, samples: int) -> dict[str, int]:
        """Counts the samples of each source among the first `samples` samples."""
        sources = np.arange(len(self.counts))
        counts = self._taken(np.full(sources.shape, samples, np.uint64), sources).tolist()
        if self._weights:
            extra = _divided(counts.pop(), self._weights)
            counts = [count + more for count, more in zip(counts, extra, strict=True)]
        return dict(zip(self.names, counts, strict=True))
