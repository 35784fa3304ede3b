"""A user's own source needs only `rows`; errors describe its batches."""

import dataclasses

import numpy as np
import pytest

from llama_jax.data.batches import Batches, SyntheticBatches
from llama_jax.data.loader import device_batches
from llama_jax.data.shards.reader import TokenDataset
from llama_jax.data.source import BatchSource, check_batch
from llama_jax.data.streaming import Position, StreamingBatches
from llama_jax.data.training_data import TrainingData
from llama_jax.errors import UserError
from llama_jax.parallel.sharding import batch_sharding
from tests.helpers import mesh_of, text_config

T, BATCH = 16, 8


class Numbers(BatchSource):
    """A source with only `rows`: row r of step s holds s + r, s + r + 1, .."""

    def rows(self, step, rows):
        tokens = np.stack([np.arange(step + row, step + row + T + 1) for row in rows])
        tokens = tokens.astype(np.int32) % 64
        weights = np.ones((len(rows), T), np.float32)
        return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def test_one_method_is_enough():
    source = Numbers()
    found = list(device_batches(source, 3, 6, batch_sharding(mesh_of((1, 2, 1, 1))), BATCH, T))
    assert [int(batch["inputs"][2, 0]) for batch in found] == [5, 6, 7]
    assert source.state(3) == [] and source.epochs(3) == source.metrics(3) == {}
    assert source.summary(3) == [] and source.describe(3) == "Numbers.rows(3, ..)"
    data = TrainingData(source)
    assert (data.validation, data.tokenizer, data.fingerprint) == (None, None, "source Numbers")


def test_epochs_are_logged_and_in_the_overview():
    source = Numbers()
    source.epochs = lambda step: {"a": step / 4, "": step / 8}
    assert source.metrics(2) == {"epochs/a": 0.5, "epochs": 0.25}
    assert source.summary(4) == ["data    epochs at the end: a 1.00, the source 0.50"]


GOOD = {
    "inputs": np.zeros((BATCH, T), np.int32),
    "targets": np.zeros((BATCH, T), np.int32),
    "weights": np.ones((BATCH, T), np.float32),
}


@pytest.mark.parametrize("more", [(), ("segment_ids",), ("segment_ids", "positions")])
def test_a_right_batch(more):
    check_batch(Numbers(), GOOD | {name: GOOD["inputs"] for name in more}, BATCH, T)


WRONG = [
    (["inputs"], "a list, not a dict of arrays"),
    ({"inputs": GOOD["inputs"]}, "no targets and no weights"),
    (
        GOOD | {"mask": GOOD["inputs"]},
        "an unknown array 'mask'; the names are inputs, targets, weights, segment_ids, positions",
    ),
    (
        GOOD | {"inputs": np.zeros((BATCH, T), np.int64), "targets": GOOD["targets"][:2]},
        "inputs of int64, not int32; targets of shape (2, 16), not (8, 16) (rows, train.seq_len)",
    ),
    (GOOD | {"weights": 1.0}, "weights of type float, not numpy.ndarray"),
    (GOOD | {"positions": np.ones((BATCH, T), np.float32)}, "positions of float32, not int32"),
]


@pytest.mark.parametrize(("batch", "problem"), WRONG, ids=[problem[:20] for _, problem in WRONG])
def test_a_wrong_batch_is_one_line_that_names_the_class(batch, problem):
    with pytest.raises(UserError) as caught:
        check_batch(Numbers(), batch, BATCH, T)
    assert str(caught.value) == f"the batch of Numbers has {problem}"


def test_every_batch_is_checked_before_it_goes_to_the_devices():
    class Shorter(Numbers):
        def rows(self, step, rows):
            return super().rows(step, rows[: 4 if step == 2 else None])

    found = device_batches(Shorter(), 0, 5, batch_sharding(mesh_of((1, 2, 1, 1))), BATCH, T)
    next(found)
    with pytest.raises(UserError, match=r"^the batch of Shorter has inputs of shape \(4, 16\)"):
        next(found)


def test_a_source_without_rows_says_so():
    with pytest.raises(NotImplementedError, match="Bare defines no rows"):
        next(type("Bare", (BatchSource,), {})().batches(range(2), 0, 1))


# Descriptions of a step's batch in errors.


def test_the_text_of_a_batch(shards, corpus, tokenizer):
    dataset = TokenDataset.open(shards, "train")
    batches = Batches({"a": dataset, "b": dataset}, T, 20, seed=0)
    a, b = ([n for i, n in batches.draws(5, range(20)) if i == index] for index in (0, 1))
    assert len(a) == len(b) == 10
    first, second = (", ".join(map(str, numbers[:6])) for numbers in (a, b))
    assert batches.describe(5) in (
        f"a: sequences {first} and 4 more; b: sequences {second} and 4 more; "
        "see llama_jax.data --show=WORKDIR --step=5",
        f"b: sequences {second} and 4 more; a: sequences {first} and 4 more; "
        "see llama_jax.data --show=WORKDIR --step=5",
    )
    random = SyntheticBatches(64, T, BATCH, seed=7)
    assert random.describe(5) == "random tokens of train.seed=7, step 5"
    assert random.fingerprint() == "synthetic-64"
    config = text_config(corpus, data__streaming=True)
    stream = StreamingBatches(config.data, tokenizer, T)
    stream.start_at(5, list(dataclasses.astuple(Position(1, 2, 3))), 0, 1)
    assert stream.describe(5) == "epoch 1, from document 2, token 3 on"
    assert stream.describe(4) == "the streamed batch of step 5"
    with pytest.raises(UserError, match="a position in streamed data has 3 numbers"):
        stream.start_at(5, [1], 0, 1)
