"""Real batches of a mixture have the requested shares of tokens."""

import dataclasses
import hashlib
import json
import math
import random
import re
from fractions import Fraction

import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.checkpoint.saved_step import StepMeta
from llama_jax.data.batches import Batches, ValidationBatches
from llama_jax.data.mixture import MAX_PERIOD, PERIOD, Schedule, shares_by_size, shares_of_samples
from llama_jax.data.prepare.job import prepare
from llama_jax.data.shards.layout import data_fingerprint, encode_manifest, read_manifest
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.shards.writer import ShardWriter
from llama_jax.data.show import summary
from llama_jax.data.show.rows import Screen
from llama_jax.data.sources.part import Example
from llama_jax.data.training_data import open_data
from llama_jax.errors import UserError
from llama_jax.train.overview import overview
from llama_jax.train.resume import check_checkpoint
from tests.helpers import mesh_of, replace, text_config, write_manifest

HALF = {"a": Fraction(1, 2), "b": Fraction(1, 2)}


def source_of(folder, tokenizer, lengths, pack_len=0, answers=None, shard_tokens=100):
    """Writes and opens shards of documents with these lengths in tokens.

    With `answers`, document n is a conversation whose last `answers[n]` tokens are an answer.
    Its first token is marked as an answer as well, although it is never a target.
    """
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, "train-00000", 65_536, shard_tokens, pack_len)
    for number, length in enumerate(lengths):
        counts = None
        if answers is not None:
            counts = np.zeros(length, bool)
            counts[length - answers[number] :] = True
            counts[0] = True
        writer.add(Example(np.arange(length, dtype=np.int32) + 3, 1, b"", counts))
    write_manifest(folder, tokenizer, pack_len, train=writer.finish(), vocab_size=65_536)
    return TokenDataset.open(folder, "train")


def counted(batches, batch, first, stop):
    """Counts each source's targets of weight 1 in the rows of the samples `first` to `stop`."""
    names = batches.schedule.names
    found = dict.fromkeys(names, 0)
    for step in range(first // batch, -(-stop // batch)):
        rows = range(max(0, first - step * batch), min(batch, stop - step * batch))
        weights = batches.rows(step, rows)["weights"]
        for (source, _), row in zip(batches.draws(step, rows), weights, strict=True):
            found[names[source]] += int((row > 0).sum())
    return found


def shares_in(batches, batch, first, stop):
    found = counted(batches, batch, first, stop)
    return {name: Fraction(count, sum(found.values())) for name, count in found.items()}


# Counted by hand.


@pytest.mark.parametrize("batch", [1, 4, 11])
def test_short_documents_that_leave_padding(tokenizer, tmp_path, batch):
    """Rows of 7 positions hold one document, of 7 or of 4 targets: two do not fit."""
    sources = {
        "a": source_of(tmp_path / "a", tokenizer, [8] * 5, 7),
        "b": source_of(tmp_path / "b", tokenizer, [5] * 9, 7),
    }
    batches = Batches(sources, 7, batch, seed=0, shares=HALF)
    # 4 rows of 7 and 7 rows of 4 are 28 targets each; equal rows would be 63.6% and 36.4%.
    for first in (0, 11, 11_000):
        assert counted(batches, batch, first, first + 11) == {"a": 28, "b": 28}
    assert batches.schedule.shares == HALF
    assert batches.schedule.drawn(110) == {"a": 40, "b": 70}
    assert batches.epochs(11) == {"a": 4 * batch / 5, "b": 7 * batch / 9}


def test_a_source_that_is_smaller_than_a_row(tokenizer, tmp_path):
    sources = {
        "small": source_of(tmp_path / "a", tokenizer, [5]),  # one window of 4 targets
        "large": source_of(tmp_path / "b", tokenizer, [61, 100]),  # ten windows of 16
    }
    shares = {"small": Fraction(1, 4), "large": Fraction(3, 4)}
    batches = Batches(sources, 16, 7, seed=0, shares=shares)
    assert counted(batches, 7, 0, 7) == {"small": 4 * 4, "large": 3 * 16}


def test_answers_of_different_length(tokenizer, tmp_path):
    sources = {
        "chat": source_of(tmp_path / "a", tokenizer, [30] * 6, 30, [3] * 6),
        "essays": source_of(tmp_path / "b", tokenizer, [25] * 6, 30, [20] * 6),
    }
    halves = {name: Fraction(1, 2) for name in sources}
    batches = Batches(sources, 30, 5, seed=0, shares=halves)
    # 20 rows of 3 and 3 rows of 20; equal rows would be 13% and 87%.
    assert counted(batches, 5, 0, 23) == counted(batches, 5, 230, 253)
    assert counted(batches, 5, 0, 23) == {"chat": 60, "essays": 60}


def test_documents_of_one_token_have_no_target(tokenizer, tmp_path):
    dataset = source_of(tmp_path / "a", tokenizer, [1, 6, 1, 3, 1], 5)
    assert dataset.packed_targets == 5 + 2
    batches = Batches({"a": dataset}, 5, 1, seed=0)
    assert counted(batches, 1, 0, batches.n_sequences) == {"a": 7}


def test_by_size_all_sources_go_at_the_same_pace(tokenizer, tmp_path):
    """The requested share is the source's part of all tokens that count."""
    sources = {
        "a": source_of(tmp_path / "a", tokenizer, [8] * 5, 7),  # five rows
        "b": source_of(tmp_path / "b", tokenizer, [5] * 9, 7),  # nine
    }
    batches = Batches(sources, 7, 2, seed=0)
    assert batches.epochs(7) == {"a": 1, "b": 1}
    assert counted(batches, 2, 0, 14) == {"a": 35, "b": 36}
    assert batches.schedule.shares == {"a": Fraction(35, 71), "b": Fraction(36, 71)}


def test_by_size_the_batches_are_those_of_before():
    """Runs of earlier versions without a mixture can resume, even with rounded shares."""
    counts = {"a": 123_457, "b": 7_654_321, "c": 3}
    counted = {"a": 252_839_936, "b": 15_000_000_001, "c": 17}
    means = {name: Fraction(counted[name], count) for name, count in counts.items()}
    schedule = Schedule(shares_by_size(counted), means)
    before = Schedule(shares_by_size(counts))
    assert schedule.period == before.period == MAX_PERIOD
    samples = np.arange(10**7, 10**7 + MAX_PERIOD, dtype=np.uint64)
    for found, expected in zip(schedule.assign(samples), before.assign(samples), strict=True):
        np.testing.assert_array_equal(found, expected)


# For any documents.

LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=4)


@pytest.mark.parametrize("packed", [False, True])
@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.tuples(LENGTHS, LENGTHS),
    seq_len=st.integers(3, 20),
    share=st.fractions(min_value=Fraction(1, 8), max_value=Fraction(7, 8), max_denominator=8),
)
def test_whole_epochs_have_the_exact_shares(
    tmp_path_factory, tokenizer, packed, lengths, seq_len, share
):
    folder = tmp_path_factory.mktemp("exact")
    sources = {
        name: source_of(folder / name, tokenizer, each, seq_len * packed)
        for name, each in zip("ab", lengths, strict=True)
    }
    shares = {"a": share, "b": 1 - share}
    batches = Batches(sources, seq_len, 8, seed=0, shares=shares)
    # After this many samples, each source has completed whole epochs.
    drawn = batches.schedule.drawn(batches.schedule.period)
    periods = math.lcm(
        *(Fraction(drawn[name], count).denominator for name, count in batches.counts.items())
    )
    whole = periods * batches.schedule.period
    if whole <= 800:
        assert shares_in(batches, 8, 0, whole) == shares
        assert shares_in(batches, 8, whole, 2 * whole) == shares
    # For larger sizes: the number of rows times the mean targets of a row, over one epoch.
    means = {}
    for name, dataset in sources.items():
        alone = Batches({name: dataset}, seq_len, 8, seed=0)
        means[name] = Fraction(counted(alone, 8, 0, alone.n_sequences)[name], alone.n_sequences)
    tokens = {name: count * means[name] for name, count in batches.schedule.drawn(whole).items()}
    assert tokens["a"] / sum(tokens.values()) == share


@pytest.mark.parametrize("pack_len", [0, 64])
def test_before_an_epoch_shares_are_off_by_chance_only(tokenizer, tmp_path, pack_len):
    rng = np.random.default_rng(0)
    sources = {
        name: source_of(
            tmp_path / name,
            tokenizer,
            rng.integers(2, longest, count).tolist(),
            pack_len,
            None,
            900,
        )
        for name, longest, count in (("a", 6, 4000), ("b", 64, 900), ("c", 200, 300))
    }
    shares = {"a": Fraction(1, 20), "b": Fraction(3, 5), "c": Fraction(7, 20)}
    batches = Batches(sources, 64, 16, seed=3, shares=shares)
    rows = batches.n_sequences // 3
    found = shares_in(batches, 16, 1000, 1000 + rows)
    for name, share in shares.items():
        # Rows of a source differ by at most 64 tokens, and their number by at most three.
        drawn = float(share) * rows
        assert abs(found[name] - share) < float(share) * (3 / drawn + 4 / math.sqrt(drawn) / 4)


def test_shares_are_a_function_of_the_step_on_any_number_of_hosts(tokenizer, tmp_path):
    rng = np.random.default_rng(1)
    sources = {
        name: source_of(tmp_path / name, tokenizer, rng.integers(2, 30, count).tolist(), 20)
        for name, count in (("a", 30), ("b", 41), ("c", 17))
    }
    shares = {"a": Fraction(1, 2000), "b": Fraction(1, 3), "c": Fraction(3997, 6000)}
    batches = Batches(sources, 20, 12, 0, shares)
    assert batches.schedule.period == PERIOD  # some samples are left over
    straight = list(batches.batches(range(12), 40, 60))
    again = Batches(sources, 20, 12, 0, shares)
    for step, batch in enumerate(again.batches(range(12), 50, 60), start=50):
        parts = [again.rows(step, range(first, first + 4)) for first in (0, 4, 8)]
        for name, value in batch.items():
            np.testing.assert_array_equal(value, straight[step - 40][name])
            np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))


# Shares whose denominators are beyond a period.


def made_up(weights, means):
    names = [f"s{index}" for index in range(len(weights))]
    shares = {n: Fraction(w, sum(weights)) for n, w in zip(names, weights, strict=True)}
    return shares, dict(zip(names, means, strict=True))


FINE = [
    ([1, 1999], [Fraction(123_457, 1000), Fraction(2_047_999, 1000)]),
    ([5, 4998, 4997], [Fraction(99_991, 77), Fraction(12_345, 7), Fraction(2048)]),
    ([67, 15, 5, 4, 4, 3, 2], [Fraction(2048) - Fraction(1, 7 + i) for i in range(7)]),
    ([1, 10**6], [Fraction(3), Fraction(7)]),
]


@pytest.mark.parametrize(("weights", "means"), FINE)
def test_fine_shares_are_kept(weights, means):
    shares, means = made_up(weights, means)
    expected = shares_of_samples(shares, means)
    schedule = Schedule(shares, means, exact=True)
    for n in (10**6, 10**8 + 7, 10**10):
        drawn = schedule.drawn(n)
        assert sum(drawn.values()) == n
        for name, count in drawn.items():
            assert abs(count - n * expected[name]) < 2 + len(shares) / 4
    tokens = {name: count * means[name] for name, count in drawn.items()}
    for name, share in shares.items():
        assert tokens[name] / sum(tokens.values()) == pytest.approx(float(share), rel=1e-3)


@pytest.mark.parametrize(("weights", "means"), FINE)
@pytest.mark.parametrize("start", [0, 10**9 - 7])
def test_draws_are_numbered_also_where_shares_are_fine(weights, means, start):
    shares, means = made_up(weights, means)
    schedule = Schedule(shares, means, exact=True)
    n = 2 * MAX_PERIOD + 11
    source, draw = schedule.assign(np.arange(start, start + n, dtype=np.uint64))
    before, after = schedule.drawn(start), schedule.drawn(start + n)
    for index, name in enumerate(shares):
        mine = draw[source == index].astype(np.int64)
        np.testing.assert_array_equal(mine, np.arange(before[name], after[name]))


# Mixtures that are refused.


@pytest.mark.parametrize("shares", [None, HALF])
def test_a_source_without_a_token_that_counts(tokenizer, tmp_path, shares):
    sources = {
        "a": source_of(tmp_path / "a", tokenizer, [8] * 5, 10, [2] * 5),
        "b": source_of(tmp_path / "b", tokenizer, [9] * 5, 10, [0] * 5),
    }
    with pytest.raises(UserError, match=r"b holds 45 tokens, and none of them counts in the loss"):
        Batches(sources, 10, 4, 0, shares)
    validation = ValidationBatches(sources, 10, 4)
    assert validation.n_sequences == 5
    ones = source_of(tmp_path / "ones", tokenizer, [1, 1, 1], 10)
    with pytest.raises(UserError, match="holds 3 tokens, and none of them counts"):
        Batches({"": ones}, 10, 4, 0)


def test_a_manifest_that_does_not_count_its_answers(tokenizer, tmp_path):
    source_of(tmp_path / "a", tokenizer, [8] * 5, 10, [2] * 5)
    manifest = read_manifest(tmp_path / "a")
    assert manifest["splits"]["train"]["answer_tokens"] == 10
    del manifest["splits"]["train"]["shards"][0]["answer_tokens"]
    (tmp_path / "a" / "manifest.json").write_bytes(encode_manifest(manifest))
    with pytest.raises(UserError, match=r"manifest.json is damaged: .*answer_tokens"):
        TokenDataset.open(tmp_path / "a", "train")


# Output of the commands.


@pytest.fixture(scope="module")
def chats(tokenizer, tmp_path_factory):
    """Prepares two sources of conversations, with short answers and with long ones."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer.save(folder / "tokenizer.model")
    rng = random.Random(0)
    for name, words in (("short", 1), ("long", 40)):
        lines = [
            json.dumps(
                {
                    "instruction": f"{number} " + " ".join(rng.choices("abcdef", k=12)),
                    "output": " ".join(rng.choices("abcdef", k=words)),
                }
            )
            for number in range(40)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    config = text_config(
        f"short={folder}/short.jsonl; long={folder}/long.jsonl",
        data__packing="best_fit",
        data__template="llama2",
        data__tokenizer=str(folder / "tokenizer.model"),
        data__mixture="short=0.5,long=0.5",
        train__seq_len=256,
    )
    prepare(config, folder / "shards", log=lambda line: None)
    return folder / "shards", config


def test_show_says_which_tokens_count(chats):
    folder, config = chats
    prepared = summary.open_prepared(folder, config)
    text = summary.summary(prepared, 4, Screen())
    header, *rows = next(
        lines
        for index, line in enumerate(text.splitlines())
        if line.startswith("source") and (lines := text.splitlines()[index : index + 3])
    )
    columns = re.split(r"  +", header)
    table = {row.split()[0]: dict(zip(columns, row.split(), strict=True)) for row in rows}
    # Counts the tokens in 1,000 rows, which are 125 batches.
    counts, tokens = {"short": 0, "long": 0}, {"short": 0, "long": 0}
    for step in range(4, 129):
        batch = prepared.batches.rows(step, range(8))
        for row, (source, _) in enumerate(prepared.batches.draws(step, range(8))):
            name = prepared.batches.schedule.names[source]
            counts[name] += int(batch["weights"][row].sum())
            tokens[name] += int((batch["segment_ids"][row] > 0).sum())
    for name, row in table.items():
        assert row["requested"] == "50.00%"
        assert row["realised"] == f"{counts[name] / sum(counts.values()):.2%}"
        assert row["with prompts"] == f"{tokens[name] / sum(tokens.values()):.2%}"
        assert counts[name] / sum(counts.values()) == pytest.approx(0.5, abs=0.01)
    assert tokens["short"] > 3 * tokens["long"]
    assert "requested, realised: of the tokens that count, those of answers, in the 1,000" in text
    assert "with prompts: of all tokens in the 1,000 sequences from step 4 on" in text
    realised = summary.realised_shares(prepared, 4)
    assert realised["short"] == counts["short"] / sum(counts.values())


def test_a_run_says_its_shares(chats):
    folder, config = chats
    data = open_data(replace(config, data__mixture="short=3,long=1"), epath.Path(folder))
    mesh = mesh_of((1, 1, 1, 1))
    text = overview(replace(config, data__mixture="short=3,long=1"), mesh, data)
    assert "data    shares of tokens in answers: short 75%, long 25%" in text
    by_size = replace(config, data__mixture="")
    assert "shares of" not in overview(by_size, mesh, open_data(by_size, epath.Path(folder)))


def test_a_run_with_shares_of_sequences_does_not_go_on_silently(chats):
    """In earlier versions, shares were of sequences: the same config has other batches now."""
    folder, config = chats
    data = open_data(config, epath.Path(folder))
    parts = [
        f"{name} {data_fingerprint(read_manifest(folder / name))}" for name in ("short", "long")
    ]
    before = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    assert data.fingerprint != before
    meta = StepMeta(config, 5, before, data.tokenizer.model_bytes)
    with pytest.raises(UserError, match=r"shares of sequences; they are shares of tokens now") as e:
        check_checkpoint(meta, "run/5", config, data)
    assert str(e.value).endswith("accept the new batches with --config.data.accept_other_data=True")
    told = replace(config, data__accept_other_data=True)
    changes = check_checkpoint(meta, "run/5", told, data)
    assert changes["data fingerprint"] == (before, data.fingerprint)
    # A run without shares goes on with shares if this is accepted; its version saved no sources.
    by_size = replace(config, data__mixture="")
    sized = dataclasses.replace(meta, config=by_size)
    changes = check_checkpoint(sized, "run/5", config, data, accept=["data.mixture"])
    assert changes["data.mixture"] == ("", config.data.mixture)
    with pytest.raises(UserError, match=r"was trained on data other, but this is data"):
        of_other = dataclasses.replace(sized, data_fingerprint="other")
        check_checkpoint(of_other, "run/5", config, data, accept=["data.mixture"])
    # Other data are still reported as such, and a run of this version resumes.
    other = StepMeta(config, 5, "other", data.tokenizer.model_bytes)
    with pytest.raises(UserError, match=r"was trained on data other, but this is data"):
        check_checkpoint(other, "run/5", config, data)
    assert (
        check_checkpoint(
            dataclasses.replace(meta, data_fingerprint=data.fingerprint), "run/5", config, data
        )
        == {}
    )
    # With shares by size, or with one source, the rows are those of earlier versions.
    by_size = open_data(replace(config, data__mixture=""), epath.Path(folder))
    assert (by_size.fingerprint, by_size.former_fingerprint) == (before, "")
    one = replace(config, data__mixture="long=1", data__source="long=x", data__path=str(folder))
    assert open_data(one, epath.Path(folder)).fingerprint == parts[1].split()[1]
