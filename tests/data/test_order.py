"""Guarantees on the order of the data, for any documents, lengths, seeds and hosts."""

import itertools
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.data.batches import Batches, SyntheticBatches
from llama_jax.data.loader import device_batches, host_batches, made_ahead
from llama_jax.data.shards import reader
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.shards.writer import ShardWriter
from llama_jax.data.sources.part import Example
from llama_jax.parallel.sharding import batch_sharding
from tests.helpers import mesh_of, until, write_manifest

# The suppressed check is safe here: no example changes a fixture.
FEW = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SEEDS = st.integers(0, 2**32 - 1)
LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=25)


def dataset_of(folder, tokenizer, lengths, shard_tokens, pack_len=0):
    """Writes and opens shards of documents with the tokens 0, 1, 2, .., so that each is unique."""
    writer = ShardWriter(folder, "train-00000", 65_536, shard_tokens, pack_len)
    ends = np.cumsum(lengths)
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        writer.add(Example(np.arange(start, stop, dtype=np.int32), 1, b""))
    write_manifest(folder, tokenizer, pack_len, train=writer.finish(), vocab_size=65_536)
    return TokenDataset.open(folder, "train")


def samples_of(batches, batch, first, count):
    """Returns `count` rows from sample number `first` on, stacked."""
    rows = [
        batches.rows(step, range(row, row + 1))
        for step, row in (divmod(sample, batch) for sample in range(first, first + count))
    ]
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("packed", [False, True])
@FEW
@given(
    lengths=LENGTHS,
    shard_tokens=st.integers(1, 200),
    seq_len=st.integers(1, 50),
    batch=st.integers(1, 9),
    seed=SEEDS,
    epoch=st.integers(0, 3),
)
def test_every_token_is_used_exactly_once_in_every_epoch(
    tmp_path_factory, tokenizer, packed, lengths, shard_tokens, seq_len, batch, seed, epoch
):
    folder = tmp_path_factory.mktemp("once")
    pack_len = seq_len if packed else 0
    dataset = dataset_of(folder, tokenizer, lengths, shard_tokens, pack_len)
    batches = Batches({"": dataset}, seq_len, batch, seed)
    n = batches.n_sequences
    rows = samples_of(batches, batch, epoch * n, n)
    used = rows["weights"] == 1
    inputs, targets = rows["inputs"][used], rows["targets"][used]
    # Each token except the last one (packed: the last of each document) is an input, once.
    last = np.cumsum(lengths)[slice(None) if packed else slice(-1, None)] - 1
    np.testing.assert_array_equal(np.sort(inputs), np.delete(np.arange(sum(lengths)), last))
    np.testing.assert_array_equal(targets, inputs + 1)
    assert set(np.unique(rows["weights"])) <= {0.0, 1.0}


@pytest.fixture(scope="module")
def three(tokenizer, tmp_path_factory):
    """Writes and opens three sources of many documents."""
    rng = np.random.default_rng(0)
    return {
        name: dataset_of(
            tmp_path_factory.mktemp(name), tokenizer, rng.integers(2, 60, count).tolist(), 500
        )
        for name, count in (("a", 30), ("b", 90), ("c", 200))
    }


def shares_of(weights):
    return {
        name: Fraction(weight, sum(weights)) for name, weight in zip("abc", weights, strict=True)
    }


SHARES = st.tuples(*3 * [st.integers(1, 7)])


@FEW
@given(
    seed=SEEDS,
    step=st.integers(0, 10**9),
    weights=SHARES,
    cuts=st.lists(st.integers(1, 11), max_size=4, unique=True),
)
def test_batches_do_not_depend_on_the_number_of_hosts(three, seed, step, weights, cuts):
    batches = Batches(three, 16, 12, seed, shares_of(weights))
    whole = batches.rows(step, range(12))
    edges = [0, *sorted(cuts), 12]
    parts = [batches.rows(step, range(*edge)) for edge in itertools.pairwise(edges)]
    for name, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))


@settings(FEW, max_examples=10)
@given(seed=SEEDS, start=st.integers(0, 10**6), more=st.integers(0, 5))
def test_batches_do_not_depend_on_restarts(three, seed, start, more):
    """A new object gives the same batches from any step on, also through the prefetcher."""
    batches = Batches(three, 16, 6, seed)
    again = Batches(three, 16, 6, seed)
    found = list(host_batches(again, range(6), start + more, start + 6))
    assert len(found) == 6 - more
    for step, batch in enumerate(found, start + more):
        for name, value in batches.rows(step, range(6)).items():
            np.testing.assert_array_equal(batch[name], value)


@FEW
@given(seeds=st.tuples(SEEDS, SEEDS), weights=SHARES)
def test_another_seed_changes_the_order_and_nothing_else(three, seeds, weights):
    both = [Batches(three, 16, 8, seed, shares_of(weights)) for seed in seeds]
    assert both[0].counts == both[1].counts
    draws = [[d for step in range(80) for d in b.draws(step, range(8))] for b in both]
    assert [source for source, _ in draws[0]] == [source for source, _ in draws[1]]
    for index, count in enumerate(both[0].counts.values()):
        first, second = ([number for s, number in d if s == index][:count] for d in draws)
        if len(first) == count:  # a whole epoch: the same sequences
            assert sorted(first) == sorted(second) == list(range(count))
        assert len(first) < 10 or (first == second) == (seeds[0] == seeds[1])


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_batches_do_not_depend_on_worker_threads(three, threads):
    """The order holds even if later steps are ready earlier."""
    batches = Batches(three, 16, 6, 0)

    def uneven(step, rows):
        time.sleep(0.03 * (step % 3 == 0))
        return batches.rows(step, rows)

    for step, batch in enumerate(made_ahead(uneven, range(6), 0, 9, threads)):
        np.testing.assert_array_equal(batch["inputs"], batches.rows(step, range(6))["inputs"])


def test_batches_are_made_ahead_of_their_use(three):
    batches, made = Batches(three, 16, 6, 0), []

    def counted(step, rows):
        made.append(step)
        return batches.rows(step, rows)

    found = made_ahead(counted, range(6), 0, 100, batches.ahead)
    next(found)
    until(lambda: max(made) >= batches.ahead > 1)
    assert max(made) < 10  # ahead, but only by a few


def test_the_next_batch_goes_to_the_device_before_this_one_is_used():
    made = []

    class Counted(SyntheticBatches):
        def rows(self, step, rows):
            made.append(step)
            return super().rows(step, rows)

    sharding = batch_sharding(mesh_of((1, 2, 1, 1)))
    found = device_batches(Counted(64, 16, 8, 0), 0, 4, sharding, 8, 16)
    for expected in ([0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]):
        next(found)
        assert made == expected
    assert next(found, None) is None


def test_nothing_is_scanned_at_the_start(tokenizer, tmp_path, monkeypatch):
    dataset_of(tmp_path, tokenizer, [20] * 100, 50)  # in 34 shards
    opened = []

    class Recorded(reader._FileArray):
        def __init__(self, path, dtype):
            opened.append(path)
            super().__init__(path, dtype)

    monkeypatch.setattr(reader, "_open_array", Recorded)
    dataset = TokenDataset.open(tmp_path, "train")
    batches = Batches({"": dataset}, 16, 2, 0)
    assert len(dataset._shards) == 34 and opened == []
    batches.rows(500_000, range(2))
    assert 1 <= len(opened) <= 4  # two rows, each of at most two shards
