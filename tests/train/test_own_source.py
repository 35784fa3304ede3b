"""Runs on batches from a `BatchSource` that the caller wrote."""

import jax
import numpy as np
import pytest

from llama_jax.checkpoint.saved_step import load_meta
from llama_jax.data.source import BatchSource
from llama_jax.data.training_data import TrainingData
from llama_jax.errors import UserError
from llama_jax.train.run import train
from tests.data.test_source import Numbers
from tests.helpers import TINY, records, replace
from tests.train.test_run import losses, stop_after

pytestmark = pytest.mark.usefixtures("shared_steps")

CONFIG = replace(
    TINY,
    train__steps=6,
    train__global_batch=8,
    train__eval_every=4,
    train__eval_batches=2,
    train__checkpoint_every=4,
)


class Walk(BatchSource):
    """Begins each batch where the one before ended: it does not depend on the step alone."""

    def __init__(self):
        self.at = {}

    def start_at(self, step, state, process, processes):
        assert (process, processes) == (0, 1)
        self.at = {step: state[0] if state else 3}

    def batches(self, rows, start, stop):
        for step in range(start, stop):
            yield Numbers().rows(self.at[step], rows)
            self.at[step + 1] = (5 * self.at[step] + 1) % 64

    def state(self, step):
        return [self.at[step]]


@pytest.mark.parametrize("source", [Numbers, Walk])
def test_a_run_stopped_and_resumed_ends_at_the_same_bits(source, tmp_path, monkeypatch, capsys):
    def go(workdir):
        return jax.device_get(train(CONFIG, tmp_path / workdir, TrainingData(source())))

    whole = go("whole")
    assert int(whole.step) == 6
    assert "eval    none, because there is no validation data: eval_loss" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert int(go("parts").step) == 3
    meta = load_meta(tmp_path / "parts" / "checkpoints" / "3")
    assert meta.positions == ([] if source is Numbers else [[(5 * (5 * 16 + 1) + 1) % 64]])
    parts = go("parts")
    assert "resume  from step 3" in capsys.readouterr().out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    assert not (tmp_path / "whole" / "data").exists()


def test_a_validation_of_ones_own(tmp_path):
    """An endless source is evaluated for eval_batches, one with an end for no more than it has."""
    few = Numbers()
    few.n_sequences = 8
    for workdir, validation in (("endless", Numbers()), ("few", few)):
        train(CONFIG, tmp_path / workdir, TrainingData(Numbers(), validation))
    found = [
        [line["eval_loss"] for line in records(tmp_path / workdir) if "eval_loss" in line]
        for workdir in ("endless", "few")
    ]
    assert len(found[0]) == len(found[1]) == 2
    assert found[0] != found[1]


def test_another_source_is_other_data(tmp_path):
    train(CONFIG, tmp_path, TrainingData(Numbers()))
    with pytest.raises(UserError, match=r"was trained on data source Numbers, but .* source Walk;"):
        train(CONFIG, tmp_path, TrainingData(Walk()))
    with pytest.raises(UserError, match=r"was trained on data source Numbers, but .* synthetic-64"):
        train(CONFIG, tmp_path)


def test_a_tokenizer_that_the_model_has_no_rows_for(tokenizer, tmp_path):
    with pytest.raises(UserError, match="tokenizer of the given data has 300 ids, but model.vocab"):
        train(CONFIG, tmp_path, TrainingData(Numbers(), tokenizer=tokenizer))
