"""Batches of token shards: which sequence is in which row of which step.

This is a pure function of (seed, step), so a run resumes at any step without saved state and
without a replay. Each host makes its own rows and does not communicate with the others.

A source is cut into sequences: either windows of T + 1 tokens with stride T, so that each token is
once an input and once a target (concatenate-and-chunk, as in LLaMA), or whole documents that
`prepare` has packed. A fixed schedule decides which source each row comes from. In each epoch,
a source shows all of its sequences once, in a new random order.
"""

import math
import zlib
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from llama_jax.data.mixture import Schedule, shares_by_size
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.source import BatchSource, Local
from llama_jax.errors import UserError

AHEAD = 2  # batches that are made ahead on the host
NAMED = 6  # `Batches.describe` names at most this many sequences of a source


def _mix(x: Any) -> Any:
    """Scrambles 64-bit words with the finaliser of splitmix64 (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Returns the image of each index under a keyed random permutation of range(n).

    It needs O(1) memory: a Feistel network of 8 rounds with splitmix64 as round function, over the
    next even number of bits, is applied until the result is below n. (The index shuffles of
    TensorFlow and Grain use 4 rounds of another cipher, whose neighbours are visibly correlated.)

    Args:
      index: uint64 array of values below n.
      n: size of the permutation.
      key: selects the permutation, 0 <= key < 2**64.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = _mix(np.uint64(key) ^ _mix(np.arange(8, dtype=np.uint64)))

    def once(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return (left << half) | right

    out = once(np.asarray(index, np.uint64))
    while (outside := out >= np.uint64(n)).any():
        out[outside] = once(out[outside])
    return out


class Sequences:
    """The sequences of one split of token shards, in a new random order every epoch."""

    def __init__(self, dataset: TokenDataset, seq_len: int, seed: int, name: str = "") -> None:
        """Cuts a split into sequences.

        Args:
          dataset: the split.
          seq_len: T, tokens in a sequence.
          seed: selects the order, together with the name.
          name: name of the source.

        Raises:
          UserError: the split has fewer than two tokens, has no token that counts in the loss, or
            is packed for another T.
        """
        if dataset.n_tokens < 2:
            raise UserError(
                f"{dataset.folder} holds {dataset.n_tokens} tokens, too few to train on"
            )
        if dataset.pack_len not in (0, seq_len):
            raise UserError(
                f"{dataset.folder} is packed for train.seq_len={dataset.pack_len}, not {seq_len}; "
                "prepare it again in another folder"
            )
        self._dataset, self._length = dataset, seq_len
        self.packed = dataset.pack_len > 0
        # Without packing: windows of T + 1 tokens with stride T.
        windows = -(-(dataset.n_tokens - 1) // seq_len)
        self.count = dataset.n_sequences if self.packed else windows
        # Targets of weight 1 in an epoch.
        self.counted = dataset.packed_targets if self.packed else dataset.n_tokens - 1
        if not self.count or not self.counted:
            raise UserError(
                f"{dataset.folder} holds {dataset.n_tokens:,} tokens, and none of them counts in "
                "the loss: leave this source out, or prepare it again from other text"
            )
        source = zlib.crc32(name.encode())
        self._key = _mix(_mix(np.uint64(seed)) ^ np.uint64(source))

    def order(self, draws: np.ndarray) -> np.ndarray:
        """Returns the number of the sequence that each draw (uint64) selects.

        The draws of one epoch are a permutation of all sequences.
        """
        epoch, index = np.divmod(draws, np.uint64(self.count))
        out = np.empty_like(index)
        for number in np.unique(epoch):
            same = epoch == number
            out[same] = permute(index[same], self.count, int(_mix(self._key ^ number)))
        return out

    def tokens_in(self, number: int) -> tuple[int, int]:
        """Counts the targets in a sequence that count in the loss, and its inputs.

        Raises:
          UserError: a shard is damaged.
        """
        if not self.packed:
            start = number * self._length
            inputs = len(self._dataset.tokens(start, start + self._length + 1)) - 1
            return inputs, inputs
        pieces = self._dataset.pieces(number)
        return (
            sum(int(np.count_nonzero(counts)) for _, counts in pieces),
            sum(len(piece) - 1 for piece, _ in pieces),
        )

    def fill(self, number: int, batch: Local, row: int) -> None:
        """Writes a sequence into a row of a batch of zeros.

        Args:
          number: number of the sequence.
          batch: the batch, which this changes.
          row: index of the row.

        Raises:
          UserError: a shard is damaged.
        """
        length = self._length
        if not self.packed:
            found = self._dataset.tokens(number * length, (number + 1) * length + 1)
            inputs = len(found) - 1
            batch["inputs"][row, :inputs] = found[:-1]
            batch["targets"][row, :inputs] = found[1:]
            batch["weights"][row, :inputs] = 1
            return
        start = 0
        for segment, (piece, counts) in enumerate(self._dataset.pieces(number), start=1):
            stop = start + len(piece) - 1
            batch["inputs"][row, start:stop] = piece[:-1]
            batch["targets"][row, start:stop] = piece[1:]
            batch["weights"][row, start:stop] = counts
            batch["segment_ids"][row, start:stop] = segment
            batch["positions"][row, start:stop] = np.arange(stop - start)
            start = stop


def _empty(rows: int, seq_len: int, packed: bool) -> Local:
    names = ("inputs", "targets", *(("segment_ids", "positions") if packed else ()))
    batch: Local = {name: np.zeros((rows, seq_len), np.int32) for name in names}
    return {**batch, "weights": np.zeros((rows, seq_len), np.float32)}


class Batches(BatchSource):
    """Draws batches from one or more sources in fixed shares."""

    ahead = AHEAD

    def __init__(
        self,
        datasets: Mapping[str, TokenDataset],
        seq_len: int,
        global_batch: int,
        seed: int,
        shares: Mapping[str, Fraction] | None = None,
    ) -> None:
        """Makes the schedule of the sources.

        Args:
          datasets: the same split of each source, by name of the source.
          seq_len: T, tokens in a sequence.
          global_batch: sequences per step, over all hosts.
          seed: selects the order.
          shares: the share of each source in the tokens that count in the loss; default: in
            proportion to its size, so that all sources finish an epoch at the same time.

        Raises:
          UserError: a source has fewer than two tokens, has no token that counts in the loss, or
            is not packed as the others are.
        """
        self._sources = [
            Sequences(dataset, seq_len, seed, name) for name, dataset in datasets.items()
        ]
        packed = {source.packed for source in self._sources}
        if len(packed) > 1:
            raise UserError(
                "some sources are packed and others are not; prepare all with one packing"
            )
        self._packed = packed.pop()
        self._length, self._batch = seq_len, global_batch
        self.counts = {name: s.count for name, s in zip(datasets, self._sources, strict=True)}
        self.n_sequences: int = sum(self.counts.values())
        counted = {name: s.counted for name, s in zip(datasets, self._sources, strict=True)}
        asked = {n: shares[n] for n in datasets} if shares else shares_by_size(counted)
        means = {name: Fraction(counted[name], count) for name, count in self.counts.items()}
        self.schedule = Schedule(asked, means, exact=bool(shares))
        self._shares_given = bool(shares)
        self._of_answers = any(dataset.template_sha256 for dataset in datasets.values())

    def epochs(self, step: int) -> dict[str, float]:
        """Returns the number of passes over each source, by name, in `step` steps."""
        drawn = self.schedule.drawn(step * self._batch)
        return {name: drawn[name] / count for name, count in self.counts.items()}

    def draws(self, step: int, rows: range) -> list[tuple[int, int]]:
        """Returns the index of the source and the number of the sequence of each row."""
        samples = np.uint64(step * self._batch) + np.asarray(rows, np.uint64)
        source, draw = self.schedule.assign(samples)
        number = np.empty_like(draw)
        for index in np.unique(source):
            same = source == index
            number[same] = self._sources[index].order(draw[same])
        return list(zip(source.tolist(), number.tolist(), strict=True))

    def count(self, step: int, rows: range) -> np.ndarray:
        """Counts the tokens of each of S sources in some rows of a step.

        Returns:
          Targets that count in the loss, and inputs; shape (S, 2).

        Raises:
          UserError: a shard is damaged.
        """
        found = np.zeros((len(self._sources), 2), np.int64)
        for source, number in self.draws(step, rows):
            found[source] += self._sources[source].tokens_in(number)
        return found

    def rows(self, step: int, rows: range) -> Local:
        """Makes some rows of the global batch of a step.

        Returns:
          `inputs` and `targets` (int32) and `weights` (float32), each of shape (len(rows), T); with
          packed documents also `segment_ids` and `positions` (int32). Padding has weight 0 and
          segment 0. In conversations, only targets in an answer have weight 1.

        Raises:
          UserError: a shard is damaged.
        """
        batch = _empty(len(rows), self._length, self._packed)
        for row, (source, number) in enumerate(self.draws(step, rows)):
            self._sources[source].fill(number, batch, row)
        return batch

    def describe(self, step: int) -> str:
        """Names the sequences of a batch: at most the first `NAMED` of each source.

        The order is a function of the seed and the step, so the step identifies all of them.
        """
        found: dict[str, list[int]] = {}
        for index, sequence in self.draws(step, range(self._batch)):
            found.setdefault(self.schedule.names[index], []).append(sequence)
        texts = []
        for name, sequences in found.items():
            some = ", ".join(map(str, sequences[:NAMED]))
            more = f" and {len(sequences) - NAMED} more" if len(sequences) > NAMED else ""
            texts.append(f"{name + ': ' if name else ''}sequences {some}{more}")
        return f"{'; '.join(texts)}; see llama_jax.data --show=WORKDIR --step={step}"

    def summary(self, steps: int) -> list[str]:
        """Returns lines on the requested shares, and on the epochs at the end of the run."""
        lines = super().summary(steps)
        if self._shares_given:
            kind = "of tokens in answers" if self._of_answers else "of tokens"
            shares = self.schedule.shares.items()
            listed = ", ".join(f"{name} {100 * float(share):.4g}%" for name, share in shares)
            lines.insert(0, f"data    shares {kind}: {listed}")
        return lines


class ValidationBatches(BatchSource):
    """Has each sequence of the sources once, in a fixed order; surplus rows have weight 0."""

    ahead = AHEAD

    def __init__(
        self, datasets: Mapping[str, TokenDataset], seq_len: int, global_batch: int
    ) -> None:
        """Opens the held-out splits of the sources; sources without held-out documents are skipped.

        Args:
          datasets: the held-out split of each source, by name of the source.
          seq_len: T, tokens in a sequence.
          global_batch: sequences per step, over all hosts.

        Raises:
          UserError: a split is packed for another T.
        """
        self._sources = [
            Sequences(dataset, seq_len, 0)
            for dataset in datasets.values()
            if dataset.n_tokens > 1 and (dataset.packed_targets or not dataset.pack_len)
        ]
        self._packed = any(source.packed for source in self._sources)
        self._ends = np.cumsum([source.count for source in self._sources])
        self.n_sequences: int = int(self._ends[-1]) if self._sources else 0
        # Evaluation reads only the first batches: the stride makes them a sample of all sources.
        self._stride = coprime_stride(self.n_sequences)
        self._length, self._batch = seq_len, global_batch

    def rows(self, step: int, rows: range) -> Local:
        """Makes some rows of a batch; see `Batches.rows`."""
        batch = _empty(len(rows), self._length, self._packed)
        for row, index in enumerate(rows):
            number = step * self._batch + index
            if number < self.n_sequences:
                number = number * self._stride % self.n_sequences
                source = int(self._ends.searchsorted(number, side="right"))
                first = int(self._ends[source - 1]) if source else 0
                self._sources[source].fill(number - first, batch, row)
        return batch


def coprime_stride(n: int) -> int:
    """Returns a stride near the golden section of n that visits each of n places once."""
    stride = max(1, round(n * 0.618))
    while math.gcd(stride, n) > 1:
        stride += 1
    return stride


class SyntheticBatches(BatchSource):
    """Makes uniformly random tokens, the same for the same (seed, step, row)."""

    def __init__(self, vocab_size: int, seq_len: int, global_batch: int, seed: int) -> None:
        """Stores the arguments; the tokens are drawn by `rows`.

        Args:
          vocab_size: ids are drawn from range(vocab_size).
          seq_len: T, tokens in a sequence.
          global_batch: sequences per step, over all hosts.
          seed: selects the tokens.
        """
        self._vocab_size, self._length, self._batch = vocab_size, seq_len, global_batch
        self._seed = seed

    def rows(self, step: int, rows: range) -> Local:
        """Makes some rows of the global batch of a step; see `Batches.rows`."""
        tokens = np.stack(
            [
                np.random.default_rng((self._seed, step, row)).integers(
                    0, self._vocab_size, self._length + 1, dtype=np.int32
                )
                for row in rows
            ]
        )
        weights = np.ones((len(rows), self._length), np.float32)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

    def fingerprint(self) -> str:
        """Returns a text with the size of the vocabulary; the config determines everything else."""
        return f"synthetic-{self._vocab_size}"

    def describe(self, step: int) -> str:
        """Says how the tokens of a batch are drawn."""
        return f"random tokens of train.seed={self._seed}, step {step}"
