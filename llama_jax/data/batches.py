"""Batches of token shards: which sequence is in which row of which step.

This is a pure function of (seed, step), so a run resumes at any step without saved state and
without a replay. Each host makes its own rows and does not communicate with the others. Stages of a
run (`train.stages`) may have batches of other sizes, other shares and other sequence lengths: each
source goes on where the stage before has left it.

A source is cut into sequences: either windows of T + 1 tokens with stride T, so that each token is
once an input and once a target (concatenate-and-chunk, as in LLaMA), or whole documents that
`prepare` has packed. A fixed schedule decides which source each row comes from. In each epoch,
a source shows all of its sequences once, in a new random order.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from llama_jax.config import Config
from llama_jax.data.mixture import Schedule, parse_shares, shares_by_size
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


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the batches are made from one step on.

    Attributes:
      start: the first step, counted from 0.
      seq_len: T, tokens in a sequence.
      global_batch: sequences per step, over all hosts.
      seed: selects the order of the sequences.
      shares: the share of each source in the tokens that count in the loss; None: in proportion to
        their sizes, so that all sources finish an epoch at the same time.
    """

    start: int
    seq_len: int
    global_batch: int
    seed: int
    shares: Mapping[str, Fraction] | None = None


def recipes(config: Config) -> list[Recipe]:
    """Returns the recipes of a run, one for each stage.

    Raises:
      UserError: a mixture is malformed.
    """
    return [
        Recipe(
            stage.start,
            stage.config.train.seq_len,
            stage.config.train.global_batch,
            stage.config.train.seed,
            parse_shares(mixture) if (mixture := stage.config.data.mixture) else None,
        )
        for stage in config.stages
    ]


@dataclasses.dataclass(frozen=True)
class _Stage:
    """The batches of consecutive steps.

    Attributes:
      recipe: how they are made.
      schedule: the source of each sample.
      sources: the sequences of each source that exists, by name.
      first: number of the first sample in the schedule.
      drawn: sequences that each source had given when the schedule began, by name.
    """

    recipe: Recipe
    schedule: Schedule
    sources: Mapping[str, Sequences]
    first: int
    drawn: Mapping[str, int]

    def sample(self, step: int) -> int:
        """Returns the number of the first sample of a step in the schedule."""
        return self.first + (step - self.recipe.start) * self.recipe.global_batch

    def drawn_before(self, step: int) -> dict[str, int]:
        """Counts the sequences that each source has given before a step."""
        own = self.schedule.drawn(self.sample(step))
        return {name: count + own.get(name, 0) for name, count in self.drawn.items()}

    def epochs(self, step: int) -> dict[str, float]:
        """Returns the number of passes over each source before a step."""
        drawn = self.drawn_before(step)
        return {name: drawn[name] / source.count for name, source in self.sources.items()}


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
        *,
        later: Sequence[Recipe] = (),
        begin: Mapping[str, float] | None = None,
    ) -> None:
        """Makes the schedules of the sources.

        Args:
          datasets: the same split of each source, by name of the source.
          seq_len: T, tokens in a sequence.
          global_batch: sequences per step, over all hosts.
          seed: selects the order.
          shares: see `Recipe`.
          later: the recipes of later stages, in order.
          begin: where each source begins, in epochs, by name; default: 0.

        Raises:
          UserError: a source has fewer than two tokens, has no token that counts in the loss, or
            is not packed as the others are; or shares name an unknown source.
        """
        self.names, self._datasets = list(datasets), datasets
        self._cut: dict[tuple[str, int, int], Sequences] = {}
        self.begin = {name: (begin or {}).get(name, 0.0) for name in datasets}
        self._stages: list[_Stage] = []
        for recipe in (Recipe(0, seq_len, global_batch, seed, shares), *later):
            self._stages.append(self._stage(recipe))
        packed = {source.packed for source in self._stages[0].sources.values()}
        if len(packed) > 1:
            raise UserError(
                "some sources are packed and others are not; prepare all with one packing"
            )
        self._packed = packed.pop()
        self.counts = self.counts_at(0)
        self.n_sequences: int = sum(self.counts.values())
        self._of_answers = any(dataset.template_sha256 for dataset in datasets.values())

    def _sequences(self, name: str, seq_len: int, seed: int) -> Sequences:
        key = (name, seq_len, seed)
        if key not in self._cut:
            self._cut[key] = Sequences(self._datasets[name], seq_len, seed, name)
        return self._cut[key]

    def _stage(self, recipe: Recipe) -> _Stage:
        """Makes the stage of a recipe; the stages before it are made.

        If only the size of the batch changes, the schedule of the sources goes on: the order of the
        sequences depends only on how many were drawn. Otherwise a new schedule begins, and each
        source goes on where it is. Sequences of another length are other ones: the source then goes
        on after the same number of epochs.
        """
        for name in recipe.shares or ():
            if name not in self._datasets:
                raise UserError(
                    f"data.mixture has a share for {name!r}; the sources are "
                    f"{', '.join(self._datasets)}"
                )
        length, seed = recipe.seq_len, recipe.seed
        sources = {name: self._sequences(name, length, seed) for name in self._datasets}
        last = self._stages[-1] if self._stages else None
        if (
            last is not None
            and dataclasses.replace(
                last.recipe, start=recipe.start, global_batch=recipe.global_batch
            )
            == recipe
        ):
            return dataclasses.replace(last, recipe=recipe, first=last.sample(recipe.start))
        if last is not None and last.recipe.seq_len == length:
            drawn = last.drawn_before(recipe.start)
        else:
            epochs = last.epochs(recipe.start) if last is not None else self.begin
            drawn = {n: math.ceil(epochs[n] * s.count - 1e-6) for n, s in sources.items()}
        counted = {name: source.counted for name, source in sources.items()}
        # The schedule depends on the order of the shares: that of the text of the mixture, whatever
        # other stages name.
        asked = dict(recipe.shares or shares_by_size(counted))
        means = {name: Fraction(counted[name], sources[name].count) for name in asked}
        return _Stage(recipe, Schedule(asked, means, exact=bool(recipe.shares)), sources, 0, drawn)

    def _at(self, step: int) -> _Stage:
        """Returns the stage of a step."""
        return next(stage for stage in self._stages[::-1] if stage.recipe.start <= step)

    def counts_at(self, step: int) -> dict[str, int]:
        """Returns the number of sequences of each source, by name, at the length of a step."""
        return {name: source.count for name, source in self._at(step).sources.items()}

    @property
    def schedule(self) -> Schedule:
        """The schedule of the first stage."""
        return self.schedule_at(0)

    def schedule_at(self, step: int) -> Schedule:
        """Returns the schedule of the sources at a step."""
        return self._at(step).schedule

    def epochs(self, step: int) -> dict[str, float]:
        """Returns the number of passes over each source, by name, in `step` steps.

        They count from the beginning of each source, even if the run begins later in it.
        """
        return self._at(max(step - 1, 0)).epochs(step)

    def seen(self, step: int) -> dict[str, float]:
        """Returns the number of passes over each source, by its fingerprint, in `step` steps."""
        epochs = self.epochs(step)
        return {self._datasets[name].fingerprint: value for name, value in epochs.items()}

    def draws(self, step: int, rows: range) -> list[tuple[int, int]]:
        """Returns the index of the source in `names`, and the number of the sequence, per row."""
        stage = self._at(step)
        samples = np.uint64(stage.sample(step)) + np.asarray(rows, np.uint64)
        source, draw = stage.schedule.assign(samples)
        number = np.empty_like(draw)
        for index in np.unique(source):
            same, name = source == index, stage.schedule.names[index]
            drawn = draw[same] + np.uint64(stage.drawn[name])
            number[same] = stage.sources[name].order(drawn)
        places = [self.names.index(name) for name in stage.schedule.names]
        return [(places[i], n) for i, n in zip(source.tolist(), number.tolist(), strict=True)]

    def count(self, step: int, rows: range) -> np.ndarray:
        """Counts the tokens of each of S sources in some rows of a step.

        Returns:
          Targets that count in the loss, and inputs; shape (S, 2).

        Raises:
          UserError: a shard is damaged.
        """
        stage = self._at(step)
        found = np.zeros((len(self.names), 2), np.int64)
        for index, number in self.draws(step, rows):
            found[index] += stage.sources[self.names[index]].tokens_in(number)
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
        stage = self._at(step)
        batch = _empty(len(rows), stage.recipe.seq_len, self._packed)
        for row, (index, number) in enumerate(self.draws(step, rows)):
            stage.sources[self.names[index]].fill(number, batch, row)
        return batch

    def describe(self, step: int) -> str:
        """Names the sequences of a batch: at most the first `NAMED` of each source.

        The order is a function of the seed and the step, so the step identifies all of them.
        """
        found: dict[str, list[int]] = {}
        for index, sequence in self.draws(step, range(self._at(step).recipe.global_batch)):
            found.setdefault(self.names[index], []).append(sequence)
        texts = []
        for name, sequences in found.items():
            some = ", ".join(map(str, sequences[:NAMED]))
            more = f" and {len(sequences) - NAMED} more" if len(sequences) > NAMED else ""
            texts.append(f"{name + ': ' if name else ''}sequences {some}{more}")
        return f"{'; '.join(texts)}; see llama_jax.data --show=WORKDIR --step={step}"

    def summary(self, steps: int) -> list[str]:
        """Returns lines on the shares, on where the data begin, and on the epochs at the end."""
        kind = "of tokens in answers" if self._of_answers else "of tokens"
        lines, last = [], None
        for stage in self._stages:
            if stage.schedule is not last and stage.recipe.shares and stage.recipe.start < steps:
                shares = stage.schedule.shares.items()
                text = ", ".join(f"{name} {100 * float(share):.4g}%" for name, share in shares)
                since = stage.recipe.start and f" from step {stage.recipe.start + 1:,} on"
                lines.append(f"data    shares {kind}{since or ''}: {text}")
            last = stage.schedule
        if begun := [f"{name or 'the source'} {at:.2f}" for name, at in self.begin.items() if at]:
            lines.append(f"data    begins at these epochs (data.start): {', '.join(begun)}")
        return [*lines, *super().summary(steps)]


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
        self._datasets, self._length, self._batch = datasets, seq_len, global_batch

    def reshaped(self, seq_len: int, global_batch: int) -> "ValidationBatches":
        """Returns the same text in batches of another shape."""
        if (seq_len, global_batch) == (self._length, self._batch):
            return self
        return ValidationBatches(self._datasets, seq_len, global_batch)

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

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        global_batch: int,
        seed: int,
        *,
        later: Sequence[Recipe] = (),
        begin: float = 0.0,
    ) -> None:
        """Stores the arguments; the tokens are drawn by `rows`.

        Args:
          vocab_size: ids are drawn from range(vocab_size).
          seq_len: T, tokens in a sequence.
          global_batch: sequences per step, over all hosts.
          seed: selects the tokens.
          later: the recipes of later stages, in order.
          begin: number of steps whose tokens are passed over, because the weights have seen them.
        """
        self._vocab_size, self._begin = vocab_size, math.ceil(begin)
        self._recipes = [Recipe(0, seq_len, global_batch, seed), *later]

    def _at(self, step: int) -> Recipe:
        return next(one for one in self._recipes[::-1] if one.start <= step)

    def seen(self, step: int) -> dict[str, float]:
        """Returns the number of steps whose tokens are used up, by fingerprint."""
        return {self.fingerprint(): float(self._begin + step)}

    def rows(self, step: int, rows: range) -> Local:
        """Makes some rows of the global batch of a step; see `Batches.rows`."""
        recipe, number = self._at(step), self._begin + step
        tokens = np.stack(
            [
                np.random.default_rng((recipe.seed, number, row)).integers(
                    0, self._vocab_size, recipe.seq_len + 1, dtype=np.int32
                )
                for row in rows
            ]
        )
        weights = np.ones((len(rows), recipe.seq_len), np.float32)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}

    def fingerprint(self) -> str:
        """Returns a text with the size of the vocabulary; the config determines everything else."""
        return f"synthetic-{self._vocab_size}"

    def describe(self, step: int) -> str:
        """Says how the tokens of a batch are drawn."""
        return f"random tokens of train.seed={self._at(step).seed}, step {self._begin + step}"
