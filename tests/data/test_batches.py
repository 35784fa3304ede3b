import concurrent.futures
import hashlib
import itertools
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.data.batches import (
    Batches,
    Sequences,
    SyntheticBatches,
    ValidationBatches,
    coprime_stride,
    permute,
)
from llama_jax.data.shards.layout import FORMAT_VERSION, encode_manifest
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.errors import UserError

T, BATCH = 16, 8


def calls_of(work):
    """Counts the calls of Python and C functions in `work` and the threads that it starts."""
    counter = itertools.count()

    def count(frame, event, argument):
        if event in ("call", "c_call"):
            next(counter)

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return next(counter)


@pytest.fixture(scope="module")
def dataset(shards):
    return TokenDataset.open(shards, "train")


@pytest.fixture(scope="module")
def batches(dataset):
    return Batches({"": dataset}, T, BATCH, seed=0)


@settings(deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, key):
    out = permute(np.arange(n, dtype=np.uint64), n, key)
    assert np.array_equal(np.sort(out), np.arange(n, dtype=np.uint64))


@settings(deadline=None)
@given(n=st.integers(2**40, 2**62), key=st.integers(0, 2**64 - 1))
def test_permute_stays_in_range_when_large(n, key):
    index = np.arange(n - 100, n, dtype=np.uint64)
    out = permute(index, n, key)
    assert (out < n).all() and len(np.unique(out)) == 100


def test_permute_does_not_keep_neighbours():
    n = 10_000
    out = permute(np.arange(n, dtype=np.uint64), n, 1).astype(np.int64)
    correlation = np.corrcoef(out[:-1], out[1:])[0, 1]
    # For independent draws, the correlation has a standard deviation of 0.01.
    assert abs(correlation) < 0.05
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.05
    # A random permutation has one fixed point on average.
    assert (out == np.arange(n)).sum() < 8


def epoch_rows(batches, first_sample, count):
    samples = [divmod(first_sample + i, BATCH) for i in range(count)]
    rows = [batches.rows(step, range(row, row + 1)) for step, row in samples]
    return {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_each_token_is_once_a_target_in_an_epoch(batches, dataset, epoch):
    n = batches.n_sequences
    rows = epoch_rows(batches, epoch * n, n)
    starts = {}
    whole = dataset.tokens(0, dataset.n_tokens).astype(np.int64)
    for inputs, targets, weights in zip(*rows.values(), strict=True):
        length = int(weights.sum())
        assert (weights[:length] == 1).all()
        np.testing.assert_array_equal(inputs[1:length], targets[: length - 1])
        starts[(*inputs[:length], *targets[:length])] = length
    assert rows["weights"].sum() == dataset.n_tokens - 1
    counted = np.bincount(rows["targets"][rows["weights"] == 1], minlength=dataset.vocab_size)
    np.testing.assert_array_equal(counted, np.bincount(whole[1:], minlength=dataset.vocab_size))


def test_each_epoch_has_its_own_order(batches):
    n = batches.n_sequences
    order = [[batches.draws(*divmod_step(e * n + i))[0] for i in range(n)] for e in range(3)]
    assert all(sorted(o) == [(0, i) for i in range(n)] for o in order)
    assert order[0] != order[1] != order[2] != order[0]


def divmod_step(sample):
    step, row = divmod(sample, BATCH)
    return step, range(row, row + 1)


def test_the_seed_changes_the_order_and_nothing_else(dataset):
    first, second = (Batches({"": dataset}, T, BATCH, seed=seed) for seed in (0, 1))
    n = first.n_sequences
    orders = [[b.draws(*divmod_step(i))[0] for i in range(n)] for b in (first, second)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_together_make_the_same_batch(batches, hosts):
    whole = batches.rows(7, range(BATCH))
    size = BATCH // hosts
    parts = [batches.rows(7, range(h * size, (h + 1) * size)) for h in range(hosts)]
    for name, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))


def test_a_late_step_costs_no_more_than_the_first(batches):
    def calls(start):
        return calls_of(
            lambda: [batches.rows(step, range(BATCH)) for step in range(start, start + 20)]
        )

    calls(0)
    # The work does not grow with the step; a replay would take 500,000 / 20 times more.
    assert calls(500_000) < 2 * calls(0)


def test_weights_are_one_and_types_right(batches):
    batch = batches.rows(0, range(BATCH))
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    assert batch["weights"].dtype == np.float32
    assert {value.shape for value in batch.values()} == {(BATCH, T)}


def test_the_last_window_is_padded_with_weight_zero(shards):
    dataset = TokenDataset.open(shards, "train")
    length = next(n for n in range(20, 60) if (dataset.n_tokens - 1) % n > 1)
    batches = Batches({"": dataset}, length, 1, seed=0)
    padded = [batches.rows(step, range(1))["weights"].sum() for step in range(batches.n_sequences)]
    assert sorted(set(padded)) == [(dataset.n_tokens - 1) % length, length]


def test_evaluation_sees_each_token_once(shards):
    validation = TokenDataset.open(shards, "validation")
    batches = ValidationBatches({"": validation}, T, BATCH)
    steps = -(-batches.n_sequences // BATCH)
    rows = [batches.rows(step, range(BATCH)) for step in range(steps)]
    weights = np.concatenate([r["weights"] for r in rows])
    targets = np.concatenate([r["targets"] for r in rows])[weights == 1]
    expected = validation.tokens(1, validation.n_tokens)
    np.testing.assert_array_equal(np.sort(targets), np.sort(expected))
    assert weights.sum() == validation.n_tokens - 1


def test_fewer_tokens_than_a_window(tmp_path, shards):
    validation = TokenDataset.open(shards, "validation")
    batches = Batches({"": validation}, 100_000, 2, seed=0)
    batch = batches.rows(0, range(2))
    assert batches.n_sequences == 1
    assert batch["weights"].sum() == 2 * (validation.n_tokens - 1)


def test_epochs(batches):
    assert batches.epochs(batches.n_sequences) == {"": BATCH}


def test_synthetic_batches_are_a_function_of_seed_step_and_row():
    source = SyntheticBatches(64, T, BATCH, seed=0)
    whole = source.rows(3, range(BATCH))
    part = source.rows(3, range(4, 6))
    np.testing.assert_array_equal(whole["inputs"][4:6], part["inputs"])
    assert not np.array_equal(whole["inputs"], source.rows(4, range(BATCH))["inputs"])
    other = SyntheticBatches(64, T, BATCH, seed=1).rows(3, range(BATCH))
    assert not np.array_equal(whole["inputs"], other["inputs"])
    assert whole["inputs"].min() >= 0 and whole["inputs"].max() < 64
    np.testing.assert_array_equal(whole["inputs"][:, 1:], whole["targets"][:, :-1])


def test_too_few_tokens_to_train_on(dataset):
    import dataclasses

    with pytest.raises(UserError, match="holds 1 tokens, too few"):
        Batches({"": dataclasses.replace(dataset, n_tokens=1)}, T, BATCH, seed=0)


# Several sources, and packed documents.


@pytest.fixture(scope="module")
def three(corpus, tmp_path_factory):
    """Prepares three sources of unequal size, concatenated and packed."""
    from llama_jax.data.prepare.job import prepare
    from tests.helpers import text_config

    source = f"a={corpus}/00*.txt; b={corpus}/01*.txt,{corpus}/02*.txt; c={corpus}/03*.txt"
    found = {}
    for packing in ("concat", "best_fit"):
        folder = tmp_path_factory.mktemp("three") / packing
        config = text_config(source, data__packing=packing, train__seq_len=T)
        prepare(config, folder, log=lambda line: None)
        found[packing] = {name: TokenDataset.open(folder / name, "train") for name in "abc"}
    return found


SHARES = {"a": Fraction(1, 10), "b": Fraction(7, 10), "c": Fraction(1, 5)}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_mixture_keeps_its_shares_and_each_source_its_epochs(three, packing):
    batches = Batches(three[packing], T, BATCH, seed=0, shares=SHARES)
    steps = 120
    draws = [draw for step in range(steps) for draw in batches.draws(step, range(BATCH))]
    weights = np.concatenate([batches.rows(step, range(BATCH))["weights"] for step in range(steps)])
    means = {}
    for name, dataset in three[packing].items():
        alone = Batches({name: dataset}, T, 1, seed=0)
        rows = [alone.rows(step, range(1))["weights"].sum() for step in range(alone.n_sequences)]
        means[name] = np.mean(rows)
    parts = {name: float(share) / means[name] for name, share in SHARES.items()}
    for index, (name, share) in enumerate(SHARES.items()):
        mine = [number for source, number in draws if source == index]
        assert abs(len(mine) - len(draws) * parts[name] / sum(parts.values())) < 3
        tokens = weights[[source == index for source, _ in draws]].sum() / weights.sum()
        assert tokens == pytest.approx(float(share), rel=0.03)
        count = batches.counts[batches.names[index]]
        assert batches.epochs(steps)[name] == len(mine) / count
        for epoch in range(len(mine) // count):
            whole = mine[epoch * count : (epoch + 1) * count]
            assert sorted(whole) == list(range(count))
        if len(mine) >= 2 * count:
            assert mine[:count] != mine[count : 2 * count]


def test_without_shares_all_sources_go_at_the_same_pace(three):
    batches = Batches(three["concat"], T, BATCH, seed=0)
    step = batches.n_sequences  # eight epochs
    assert batches.epochs(step) == {"a": 8, "b": 8, "c": 8}


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_make_the_same_mixture(three, packing, hosts):
    batches = Batches(three[packing], T, BATCH, seed=0, shares=SHARES)
    whole = batches.rows(31, range(BATCH))
    size = BATCH // hosts
    parts = [batches.rows(31, range(h * size, (h + 1) * size)) for h in range(hosts)]
    for name, value in whole.items():
        np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))


def test_packed_rows_hold_whole_documents(three):
    dataset = three["best_fit"]["b"]
    batches = Batches({"b": dataset}, T, 1, seed=0)
    bos, eos = dataset.tokenizer().bos_id, dataset.tokenizer().eos_id
    used = 0
    for step in range(batches.n_sequences):
        row = {name: value[0] for name, value in batches.rows(step, range(1)).items()}
        real = row["weights"] == 1
        np.testing.assert_array_equal(real, row["segment_ids"] > 0)
        assert not row["inputs"][~real].any() and not row["positions"][~real].any()
        for segment in range(1, row["segment_ids"].max() + 1):
            mine = row["segment_ids"] == segment
            inputs, targets = row["inputs"][mine], row["targets"][mine]
            np.testing.assert_array_equal(row["positions"][mine], np.arange(mine.sum()))
            np.testing.assert_array_equal(inputs[1:], targets[:-1])
            assert eos not in inputs  # no prediction across documents
            assert bos not in targets
        used += real.sum()
    documents = sum(shard["documents"] for shard in dataset._shards)
    assert used == dataset.n_tokens - documents


def test_packed_for_another_length(three):
    with pytest.raises(UserError, match=r"packed for train.seq_len=16, not 32"):
        Batches(three["best_fit"], 32, BATCH, seed=0)
    mixed = {"a": three["best_fit"]["a"], "b": three["concat"]["b"]}
    with pytest.raises(UserError, match="some sources are packed and others are not"):
        Batches(mixed, T, BATCH, seed=0)


def test_validation_of_several_sources_sees_all_of_them_early(three):
    batches = ValidationBatches(three["concat"], T, BATCH)
    ends = [0, *batches._ends.tolist()]
    seen = [n * batches._stride % batches.n_sequences for n in range(batches.n_sequences)]
    assert sorted(seen) == list(range(batches.n_sequences))
    early = seen[:BATCH]
    for first, stop in itertools.pairwise(ends):
        expected = BATCH * (stop - first) / batches.n_sequences
        assert abs(sum(first <= n < stop for n in early) - expected) < 2


def test_a_stride_visits_every_place_once():
    for n in range(1, 400):
        stride = coprime_stride(n)
        assert sorted(i * stride % n for i in range(n)) == list(range(n))


def test_a_seed_of_one_source_does_not_order_another(three):
    same = three["concat"]["a"]
    first, second = (Sequences(same, T, 0, name) for name in ("a", "b"))
    draws = np.arange(first.count, dtype=np.uint64)
    assert first.order(draws).tolist() != second.order(draws).tolist()


def many_shards(folder, tokenizer, n):
    """Writes `n` shards of four tokens each, and returns their folder."""
    folder.mkdir()
    zeros = hashlib.sha256(bytes(16)).hexdigest()
    shards = [
        {
            "name": f"train-{number:05d}-000",
            "tokens": 4,
            "documents": 1,
            "sha256": "0",
            "index_sha256": "0",
            "ends_sha256": {"bin": zeros, "idx": zeros},
        }
        for number in range(n)
    ]
    for shard in shards:
        (folder / f"{shard['name']}.bin").write_bytes(bytes(8))
        (folder / f"{shard['name']}.idx").write_bytes(bytes(8))
    tokenizer.save(folder / "tokenizer.model")
    nothing = {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": []}
    train = {"documents": n, "tokens": 4 * n, "text_bytes": 0, "shards": shards}
    manifest = {
        "format_version": FORMAT_VERSION,
        "settings": {},
        "vocab_size": 300,
        "tokenizer_sha256": tokenizer.fingerprint,
        "skipped": {},
        "splits": {"train": train, "validation": nothing},
    }
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return folder


def test_opening_shards_takes_work_in_proportion(tmp_path, tokenizer, monkeypatch):
    """The work per shard is small: shards do not have a task each in the thread pool of 16."""
    submit, tasks = concurrent.futures.ThreadPoolExecutor.submit, []

    def counted(pool, *task):
        tasks.append(task)
        return submit(pool, *task)

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", counted)
    calls = {}
    for n in (200, 400, 2000):
        folder = many_shards(tmp_path / str(n), tokenizer, n)

        def work(folder=folder, n=n):
            dataset = TokenDataset.open(folder, "train")
            batch = Batches({"": dataset}, 8, 8, seed=0).rows(0, range(8))
            assert batch["weights"].sum() > 0 and dataset.n_tokens == 4 * n

        work()  # imports and fills caches
        tasks.clear()
        calls[n] = calls_of(work)
        assert len(tasks) < 50
    per_shard = (calls[400] - calls[200]) / 200
    print(f"{per_shard:.0f} calls for each shard")
    assert per_shard < 200
    assert (calls[2000] - calls[400]) / 1600 < 1.1 * per_shard
