import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import DataConfig
from llama_jax.data.sources.documents import read_source
from llama_jax.data.sources.part import Tally
from llama_jax.data.streaming import Position, StreamingBatches
from llama_jax.errors import UserError

T, BATCH = 16, 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Returns a config of JSON lines of unequal lengths, two of them unusable."""
    folder = tmp_path_factory.mktemp("stream")
    lines = [json.dumps({"text": f"document {n} " * (n % 7 + 1)}) for n in range(40)]
    lines[5] = "{broken"
    lines[11] = json.dumps({"text": ""})
    (folder / "a.jsonl").write_text("\n".join(lines[:25]))
    (folder / "b.jsonl").write_text("\n".join(lines[25:]))
    return DataConfig(source=f"{folder}/*.jsonl", streaming=True, part_bytes=500)


def streams(config, tokenizer, step=0, position=None, process=0, processes=1, rows=BATCH):
    source = StreamingBatches(config, tokenizer, T)
    source.start_at(step, list(dataclasses.astuple(position or Position())), process, processes)
    return source, source.batches(range(rows), step, 10_000)


def expected_tokens(config, tokenizer, process=0, processes=1):
    """Returns an endless iterator over the tokens of a process, and the number in one pass."""
    texts = list(read_source(config.source, config, Tally()))
    mine = texts[process::processes]
    one = [t for text in mine for t in (1, *tokenizer.encode(text), 2)]
    return itertools.cycle(one), len(one)


@pytest.mark.parametrize(("process", "processes"), [(0, 1), (0, 2), (1, 2)])
def test_every_token_in_order_for_several_epochs(config, tokenizer, process, processes):
    rows = BATCH // processes
    source, batches = streams(config, tokenizer, 0, None, process, processes, rows)
    tokens, length = expected_tokens(config, tokenizer, process, processes)
    steps = 3 * length // (rows * T)
    inputs, targets = [], []
    for batch in itertools.islice(batches, steps):
        assert batch["weights"].all() and batch["inputs"].shape == (rows, T)
        inputs += batch["inputs"].ravel().tolist()
        targets += batch["targets"].ravel().tolist()
    whole = list(itertools.islice(tokens, len(inputs) + 1))
    assert inputs == whole[:-1] and targets == whole[1:]
    assert source.epochs(steps) == {"": len(inputs) // length}


@settings(deadline=None, max_examples=30)
@given(step=st.integers(0, 60))
def test_going_on_at_any_position_is_exact(config, tokenizer, step):
    source, batches = streams(config, tokenizer)
    for _ in range(step):
        next(batches)
    position = source.position(step)
    later, rest = streams(config, tokenizer, step, position)
    for number in range(3):
        first, second = next(batches), next(rest)
        for name, value in first.items():
            np.testing.assert_array_equal(value, second[name])
        assert source.position(step + number + 1) == later.position(step + number + 1)


def test_positions_of_the_last_steps_are_kept(config, tokenizer):
    source, batches = streams(config, tokenizer)
    for _ in range(100):
        next(batches)
    assert source.position(100) != source.position(60)
    with pytest.raises(KeyError):
        source.position(10)
    assert source.state(100) == [
        source.position(100).epoch,
        source.position(100).document,
        source.position(100).token,
    ]
    assert source.epochs(100) == {"": source.position(100).epoch}


def test_skips_are_counted_and_told(config, tokenizer, capsys):
    """The end of a pass and `tell_skips` log the skips of this pass, if there are new ones."""
    source, batches = streams(config, tokenizer)
    assert source.skipped() == 0
    step = 0
    while source.position(step).epoch == 0:
        next(batches)
        step += 1
    said = capsys.readouterr().out
    folder = config.source.removesuffix("/*.jsonl")
    assert f"skipped  1 broken JSON line; the first: {folder}/a.jsonl at byte" in said
    assert f"skipped  1 empty; the first: {folder}/a.jsonl at byte" in said
    assert len(said.splitlines()) == 2
    while source.position(step).epoch < 3:
        next(batches)
        step += 1
        assert source.skipped() <= 2
    source.tell_skips()
    assert capsys.readouterr().out == ""
    # After a resume late in a pass, the whole pass is counted; the second process logs nothing.
    for process, lines in ((0, 2), (1, 0)):
        later, rest = streams(config, tokenizer, 7, Position(0, 30 + process), process, 2)
        next(rest)
        assert later.skipped() == 2
        later.tell_skips()
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_the_fingerprint_is_of_the_files(config, tokenizer, tmp_path):
    first = StreamingBatches(config, tokenizer, T).fingerprint()
    assert StreamingBatches(config, tokenizer, 32).fingerprint() == first
    (tmp_path / "x.jsonl").write_text('{"text": "other"}')
    other = DataConfig(source=str(tmp_path / "x.jsonl"), streaming=True)
    assert StreamingBatches(other, tokenizer, T).fingerprint() != first


def test_a_source_without_text(tokenizer, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text("{}\n{}\n")
    config = DataConfig(source=str(tmp_path / "x.jsonl"), streaming=True)
    _, batches = streams(config, tokenizer)
    with pytest.raises(UserError, match="has no text that process 0 of 1 can train on"):
        next(batches)
    assert "skipped  2 no text in field 'text'" in capsys.readouterr().out


def test_several_sources_need_shards(tokenizer, tmp_path):
    (tmp_path / "x.txt").write_text("x")
    config = DataConfig(source=f"a={tmp_path}/x.txt;b={tmp_path}/x.txt", streaming=True)
    with pytest.raises(UserError, match="reads one source"):
        StreamingBatches(config, tokenizer, T)
