"""Shards to batches: a batch is a pure function of (seed, step), on any number of hosts.

The run of tokens is cut into windows of T + 1 tokens with stride T, so that each token is once an
input and once a target. Each epoch draws all windows in a new full permutation. Nothing has to be
saved or replayed to go on at a step, and hosts need not talk to each other.
"""

import os
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from llama_jax.data.shards import TokenDataset
from llama_jax.errors import UserError

Local = dict[str, np.ndarray]
PREFETCH = 2  # batches ready on the host


def _mix(x: Any) -> Any:
    """The finaliser of splitmix64 (Steele et al., 2014): scrambles 64-bit words."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a keyed random permutation of range(n) sends each index; O(1) memory.

    A Feistel network of 8 rounds with splitmix64 as round function, over the next even number of
    bits, walked until it lands below n. (TensorFlow's and Grain's index shuffles use 4 rounds of
    another cipher, whose neighbours are visibly correlated.)

    Args:
      index: uint64 array, each below n.
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


class BatchSource(Protocol):
    """Batches by step."""

    def rows(self, step: int, rows: range) -> Local:
        """Rows of the global batch of a step: `inputs`, `targets` int32, `weights` float32."""

    def epochs(self, step: int) -> float:
        """Passes over the data in `step` steps."""


class Batches:
    """Batches of one split of token shards."""

    def __init__(
        self,
        dataset: TokenDataset,
        seq_len: int,
        global_batch: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """Batches of `global_batch` sequences of `seq_len` tokens.

        Args:
          dataset: the split.
          seq_len: T.
          global_batch: sequences per step, over all hosts.
          seed: selects the order.
          shuffle: False reads once from front to back, for evaluation; rows past the end weigh 0.

        Raises:
          UserError: the split has not even two tokens.
        """
        if dataset.n_tokens < 2:
            raise UserError(
                f"{dataset.folder} holds {dataset.n_tokens} tokens, too few to train on"
            )
        self._dataset, self._length, self._batch = dataset, seq_len, global_batch
        self._seed, self._shuffle = seed, shuffle
        self.n_windows = -(-(dataset.n_tokens - 1) // seq_len)

    def epochs(self, step: int) -> float:
        """Passes over the data in `step` steps."""
        return step * self._batch / self.n_windows

    def windows(self, step: int, rows: range) -> np.ndarray:
        """Which window each row shows; `n_windows` stands for none."""
        sample = step * self._batch + np.asarray(rows, np.uint64)
        if not self._shuffle:
            return np.minimum(sample, np.uint64(self.n_windows))
        epoch, index = np.divmod(sample, np.uint64(self.n_windows))
        out = np.empty_like(index)
        for number in np.unique(epoch):
            same = epoch == number
            key = int(_mix(_mix(np.uint64(self._seed)) ^ number))
            out[same] = permute(index[same], self.n_windows, key)
        return out

    def rows(self, step: int, rows: range) -> Local:
        """Rows of the global batch of a step: `inputs`, `targets` int32, `weights` float32.

        The last window of the run is padded with token 0 of weight 0, so that no token is left out.

        Raises:
          UserError: a damaged shard.
        """
        length = self._length
        tokens = np.zeros((len(rows), length + 1), np.int32)
        weights = np.zeros((len(rows), length), np.float32)
        for row, window in enumerate(self.windows(step, rows).tolist()):
            if window < self.n_windows:
                found = self._dataset.tokens(window * length, (window + 1) * length + 1)
                tokens[row, : len(found)] = found
                weights[row, : len(found) - 1] = 1
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


class SyntheticBatches:
    """Uniformly random tokens, the same for the same (seed, step, row)."""

    def __init__(self, vocab_size: int, seq_len: int, global_batch: int, seed: int) -> None:
        """Batches of `global_batch` sequences of `seq_len` random tokens."""
        self._vocab_size, self._length, self._batch = vocab_size, seq_len, global_batch
        self._seed = seed

    def epochs(self, step: int) -> float:
        """Random tokens never repeat."""
        return 0.0

    def rows(self, step: int, rows: range) -> Local:
        """Rows of the global batch of a step, as `Batches.rows`."""
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


def local_rows(sharding: jax.sharding.NamedSharding, global_batch: int, seq_len: int) -> range:
    """The rows of the global batch that this process's devices hold.

    Raises:
      UserError: they are not one run of rows, so the mesh puts hosts in a strange order.
    """
    indices = sharding.addressable_devices_indices_map((global_batch, seq_len)).values()
    spans = {index[0].indices(global_batch)[:2] for index in indices if index is not None}
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    if sum(stop - start for start, stop in spans) != last - first:
        raise UserError(
            f"this process would need rows {sorted(spans)} of the batch, which are not contiguous; "
            "order the mesh so that data and fsdp follow the hosts"
        )
    return range(first, last)


def iterate(source: BatchSource, rows: range, start: int, stop: int) -> Iterator[Local]:
    """The batches of the steps start..stop, made ahead by tf.data.

    TensorFlow is imported here, and only for shards: synthetic batches need none.
    """
    if isinstance(source, SyntheticBatches):
        for step in range(start, stop):
            yield source.rows(step, rows)
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # they are JAX's
    template = source.rows(start, rows)
    names = list(template)
    failures: list[UserError] = []

    def make(step: np.ndarray) -> list[np.ndarray]:
        try:
            batch = source.rows(int(step), rows)
        except UserError as error:  # TensorFlow would bury it in an error of its own
            failures.append(error)
            raise
        return [batch[name] for name in names]

    def load(step: Any) -> dict[str, Any]:
        # One call for the whole batch: a call costs 0.1 ms, whatever it returns.
        arrays = tf.numpy_function(make, [step], [template[n].dtype for n in names], stateful=False)
        return {
            name: tf.ensure_shape(array, template[name].shape)
            for name, array in zip(names, arrays, strict=True)
        }

    dataset = tf.data.Dataset.range(start, stop).map(
        load, num_parallel_calls=PREFETCH, deterministic=True
    )
    try:
        yield from dataset.prefetch(PREFETCH).as_numpy_iterator()
    except tf.errors.OpError:
        if failures:
            raise failures[0] from None
        raise


def stream(
    source: BatchSource,
    start: int,
    stop: int,
    sharding: jax.sharding.NamedSharding,
    global_batch: int,
    seq_len: int,
) -> Iterator[dict[str, jax.Array]]:
    """Global device batches of the steps start..stop; each host makes only its own rows.

    The batch of the next step is on its way to the device while the present one is computed.

    Raises:
      UserError: a damaged shard, or a mesh whose rows are not contiguous per host.
    """
    rows = local_rows(sharding, global_batch, seq_len)
    ahead: dict[str, jax.Array] | None = None
    for local in iterate(source, rows, start, stop):
        batch = {
            name: jax.make_array_from_process_local_data(sharding, array, (global_batch, seq_len))
            for name, array in local.items()
        }
        if ahead is not None:
            yield ahead
        ahead = batch
    if ahead is not None:
        yield ahead
