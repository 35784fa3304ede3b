"""Batches of a run with stages: the order of the sequences, and where each source goes on."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from etils import epath

from llama_jax.data.batches import Batches, Recipe, Sequences, SyntheticBatches, recipes
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.show import summary
from llama_jax.data.show.rows import Screen
from llama_jax.data.streaming import StreamingBatches
from llama_jax.data.training_data import open_data
from llama_jax.errors import UserError
from tests.helpers import TINY, replace, text_config

T, SEED = 16, 3
EVEN = {"a": Fraction(1, 2), "b": Fraction(1, 2)}
MOST_B = {"a": Fraction(1, 5), "b": Fraction(4, 5)}


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged") / "shards"
    source = f"a={corpus}/00*.txt; b={corpus}/01*.txt; c={corpus}/02*.txt"
    config = text_config(source, train__seq_len=T, data__path=str(folder), train__steps=40)
    prepare(config, folder, log=lambda line: None)
    return config


@pytest.fixture(scope="module")
def datasets(config):
    return {name: TokenDataset.open(epath.Path(config.data.path) / name, "train") for name in "abc"}


@pytest.fixture(scope="module")
def two(datasets):
    return {name: datasets[name] for name in "ab"}


def staged(datasets, *stages, begin=None):
    """Makes batches of stages, each (start, seq_len, global_batch, shares)."""
    first, *later = (Recipe(start, t, b, SEED, shares) for start, t, b, shares in stages)
    shape = (first.seq_len, first.global_batch, SEED, first.shares)
    return Batches(datasets, *shape, later=later, begin=begin)


def drawn(batches, sizes):
    """Returns the (source, sequence) of each row in the steps whose batches have these sizes."""
    return [draw for step, size in enumerate(sizes) for draw in batches.draws(step, range(size))]


@pytest.mark.parametrize("shares", [None, EVEN, {"a": Fraction(1, 3), "b": Fraction(2, 3)}])
def test_the_order_depends_only_on_how_many_were_drawn(two, shares):
    """As in Llama 3, whose batch doubled twice: no sequence is left out or comes twice."""
    ramp = staged(two, (0, T, 4, shares), (5, T, 8, shares), (9, T, 24, shares))
    sizes = [4] * 5 + [8] * 4 + [24] * 30
    whole = staged(two, (0, T, 2, shares))
    assert drawn(ramp, sizes) == drawn(whole, [2] * (sum(sizes) // 2))
    for step in (0, 4, 5, 6, 9, 10, 38):
        assert ramp.epochs(step) == whole.epochs(sum(sizes[:step]) // 2)


def test_each_source_goes_on_where_another_mixture_begins(two):
    batches = staged(two, (0, T, 8, EVEN), (7, T, 8, MOST_B), (20, T, 8, {"b": Fraction(1)}))
    steps = 60
    draws = drawn(batches, [8] * steps)
    for index, name in enumerate("ab"):
        sequences = Sequences(two[name], T, SEED, name)
        mine = [number for source, number in draws if source == index]
        order = sequences.order(np.arange(len(mine), dtype=np.uint64)).tolist()
        assert mine == order  # the epochs are those of a run of this source alone
        assert batches.epochs(steps)[name] == len(mine) / sequences.count
    shares = [
        sum(s == 1 for s, _ in draws[first * 8 : last * 8]) for first, last in [(0, 7), (7, 20)]
    ]
    assert abs(shares[0] - 28) <= 1 and abs(shares[1] - 0.8 * 13 * 8) <= 3
    assert {source for source, _ in draws[20 * 8 :]} == {1}


def test_sequences_of_another_length_go_on_after_as_many_epochs(two):
    long = 4 * T
    batches = staged(two, (0, T, 8, EVEN), (10, long, 2, EVEN))
    before, counts = batches.epochs(10), batches.counts_at(10)
    assert before == {name: 40 / count for name, count in batches.counts_at(9).items()}
    assert counts == {name: -(-(two[name].n_tokens - 1) // long) for name in "ab"}
    begins = {name: math.ceil(before[name] * counts[name] - 1e-6) for name in "ab"}
    draws = drawn(batches, [8] * 10 + [2] * 20)[80:]
    for index, name in enumerate("ab"):
        mine = [number for source, number in draws if source == index]
        numbers = np.arange(begins[name], begins[name] + len(mine), dtype=np.uint64)
        assert mine == Sequences(two[name], long, SEED, name).order(numbers).tolist()
        after = batches.epochs(30)[name]
        assert after == (begins[name] + len(mine)) / counts[name]
        tokens = before[name] * two[name].n_tokens + len(mine) * long
        assert after * two[name].n_tokens == pytest.approx(tokens, abs=2 * long)
    row = batches.rows(10, range(2))
    assert row["inputs"].shape == (2, long) and batches.rows(9, range(8))["inputs"].shape == (8, T)


def test_a_mixture_has_the_same_rows_whatever_other_stages_name(datasets):
    """Otherwise a change of the mixture would change the steps before it."""
    third = Fraction(1, 3)
    mixture = {"c": third, "a": third, "b": third}
    alone = staged({name: datasets[name] for name in "cab"}, (0, T, 8, mixture))
    other = staged({name: datasets[name] for name in "bca"}, (0, T, 8, mixture), (9, T, 8, EVEN))
    for step in range(9):
        one, two = alone.rows(step, range(8)), other.rows(step, range(8))
        np.testing.assert_array_equal(one["inputs"], two["inputs"])


def test_any_hosts_make_the_same_batches(two):
    stages = [(0, T, 8, EVEN), (3, 2 * T, 16, MOST_B), (6, 2 * T, 32, MOST_B)]
    batches = staged(two, *stages)
    for step, size in ((2, 8), (3, 16), (5, 16), (6, 32), (9, 32)):
        whole = batches.rows(step, range(size))
        for hosts in (2, 4, 8):
            cuts = range(0, size, size // hosts)
            parts = [batches.rows(step, range(cut, cut + size // hosts)) for cut in cuts]
            for name, array in whole.items():
                np.testing.assert_array_equal(array, np.concatenate([p[name] for p in parts]))
    # A resumed run makes other objects.
    np.testing.assert_array_equal(
        staged(two, *stages).rows(9, range(32))["inputs"], batches.rows(9, range(32))["inputs"]
    )


def test_a_run_may_begin_later_in_its_sources(two):
    begin = {"a": 0.5, "b": 1.25}
    batches, whole = staged(two, (0, T, 8, EVEN), begin=begin), staged(two, (0, T, 8, EVEN))
    assert batches.epochs(0) == pytest.approx(begin, abs=0.01)
    for index, name in enumerate("ab"):
        first = [number for source, number in drawn(batches, [8] * 4) if source == index]
        start = math.ceil(begin[name] * whole.counts[name])
        numbers = np.arange(start, start + len(first), dtype=np.uint64)
        assert first == Sequences(two[name], T, SEED, name).order(numbers).tolist()
    assert batches.seen(4) == {two[n].fingerprint: batches.epochs(4)[n] for n in "ab"}


def test_random_tokens_and_streams_have_stages(corpus, tokenizer):
    later = [Recipe(2, 8, 4, 5)]
    batches = SyntheticBatches(64, T, 8, 3, later=later)
    assert batches.rows(1, range(8))["inputs"].shape == (8, T)
    row = batches.rows(2, range(4))["inputs"]
    assert row.shape == (4, 8)
    np.testing.assert_array_equal(row, SyntheticBatches(64, 8, 4, 5).rows(2, range(4))["inputs"])
    later_on = SyntheticBatches(64, T, 8, 3, begin=6.0)
    np.testing.assert_array_equal(
        later_on.rows(1, range(8))["inputs"], batches_of(3).rows(7, range(8))["inputs"]
    )
    assert later_on.seen(1) == {"synthetic-64": 7.0}
    data = replace(TINY, data__source=str(corpus), data__streaming=True).data
    stream = StreamingBatches(data, tokenizer, [(0, T), (2, 2 * T)])
    stream.start_at(0, [], 0, 1)
    made = [*stream.batches(range(4), 0, 2), *stream.batches(range(4), 2, 4)]
    flat = np.concatenate([batch["inputs"].ravel() for batch in made])
    whole = StreamingBatches(data, tokenizer, len(flat))
    whole.start_at(0, [], 0, 1)
    np.testing.assert_array_equal(flat, next(whole.batches(range(1), 0, 1))["inputs"][0])


def batches_of(seed):
    return SyntheticBatches(64, T, 8, seed)


def test_a_run_opens_the_sources_of_all_stages(config, tmp_path):
    stages = "until 5: data.mixture=a=0.5,b=0.5; until 9: train.global_batch=16"
    run = replace(config, data__mixture="b=1,c=3", train__stages=stages)
    data = open_data(run, epath.Path(tmp_path))
    assert data.train.names == ["b", "c", "a"] and set(data.sources) == set("abc")
    names = [{data.train.names[i] for i, _ in data.train.draws(s, range(8))} for s in (4, 5, 9)]
    assert names == [{"a", "b"}, {"b", "c"}, {"b", "c"}]
    assert data.train.epochs(5)["c"] == 0.0 < data.train.epochs(40)["c"]
    assert [(r.start, r.global_batch) for r in recipes(run)] == [(0, 8), (5, 16), (9, 8)]
    lines = "\n".join(data.train.summary(40))
    assert "shares of tokens: a 50%, b 50%" in lines
    assert "shares of tokens from step 6 on: b 25%, c 75%" in lines


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__mixture": "a=1,b=1,c=1", "train__stages": "until 5: mixture=a=1,x=1"}, "see 'x'"),
        ({"train__stages": "until 5: mixture=a=1,x=1"}, "share for 'x'; the sources are a, b, c"),
        ({"train__stages": "until 5: mixture=a=1.5,b=%"}, "data.mixture: 'b=%' is not NAME=SHARE"),
        ({"data__start": "x=0.5"}, "'x=0.5' is not a number of epochs such as 0.5, or NAME=EPOCHS"),
        ({"data__start": "a=-1"}, "'a=-1' is not a number of epochs"),
        ({"data__start": "soon"}, "'soon' is not a number of epochs"),
    ],
)
def test_bad_stages_of_the_data_are_refused(config, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        open_data(replace(config, **changes), epath.Path(tmp_path))


def test_packed_shards_have_one_length(config, corpus, tmp_path):
    packed = replace(
        config, data__packing="best_fit", data__path=str(tmp_path / "p"), train__stages=""
    )
    prepare(packed, tmp_path / "p", log=lambda line: None)
    with pytest.raises(UserError, match="packed for train.seq_len=16, not 32"):
        open_data(replace(packed, train__stages="until 5: seq_len=32"), epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("text", "epochs"), [("0", 0.0), ("0.5", 0.5), ("a=0.5", 0.5), ("b=1,a=0.25", 0.25)]
)
def test_where_the_data_begin_may_be_asked_for(config, tmp_path, text, epochs):
    seen = {open_data(config, epath.Path(tmp_path)).sources["a"]: 3.0}
    data = open_data(replace(config, data__start=text), epath.Path(tmp_path), seen)
    assert data.train.epochs(0)["a"] == pytest.approx(epochs, abs=0.01)
    auto = open_data(config, epath.Path(tmp_path), seen)
    assert auto.train.epochs(0) == {"a": 3.0, "b": 0.0, "c": 0.0}
    assert (
        auto.start == "a=3.0,b=0.0,c=0.0" and open_data(config, epath.Path(tmp_path)).start == "0"
    )
    again = open_data(replace(config, data__start=auto.start), epath.Path(tmp_path))
    assert again.train.epochs(7) == auto.train.epochs(7)


def test_show_knows_the_stage(config, tmp_path):
    stages = f"until 5: data.mixture=a=1 train.global_batch=4; until 9: train.seq_len={2 * T}"
    run = replace(config, data__mixture="a=1,b=1,c=2", train__stages=stages)
    (tmp_path / "config.json").write_text(run.to_json())
    prepared = summary.open_prepared(tmp_path)
    texts = {step: summary.summary(prepared, step, Screen()) for step in (0, 5, 9)}
    assert "batch   4 sequences x 16 tokens" in texts[0]
    assert "stage   1 of 3, until step 5: data.mixture=a=1 train.global_batch=4" in texts[0]
    assert f"batch   8 sequences x {2 * T} tokens" in texts[5]
    assert "stage   3 of 3, to the end: the values of the config" in texts[9]
    rows = [line for line in texts[0].splitlines() if line.startswith(("a ", "b ", "c "))]
    assert [row.split()[1] for row in rows] == ["100.00%", "0.00%", "0.00%"]
    rows = [line for line in texts[9].splitlines() if line.startswith(("a ", "b ", "c "))]
    assert [row.split()[1] for row in rows] == ["25.00%", "25.00%", "50.00%"]
    shown = "\n".join(summary.show_rows(prepared, 4, 6, Screen()))
    assert [
        f"step {step}, row {row}" in shown for step, row in ((4, 3), (4, 4), (5, 1), (5, 2))
    ] == [*(True, False, True, False)]


def test_validation_has_the_shape_of_the_stage(config, tmp_path):
    data = open_data(config, epath.Path(tmp_path))
    assert data.validation.reshaped(T, 8) is data.validation
    long = data.validation.reshaped(2 * T, 4)
    assert long.rows(0, range(4))["inputs"].shape == (4, 2 * T)
    tokens = [
        sum(b.rows(s, range(n))["weights"].sum() for s in range(200))
        for b, n in ((data.validation, 8), (long, 4))
    ]
    assert tokens[0] == tokens[1] > 0
    assert dataclasses.is_dataclass(data)
