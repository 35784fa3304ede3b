"""Batches whose loss or gradient is not finite or far too large, as in docs/reliability.md."""

import dataclasses
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint.saved_step import find_step
from llama_jax.errors import UserError
from llama_jax.train import loop
from llama_jax.train import run as run_lib
from llama_jax.train.bad_steps import explain
from tests.helpers import TINY, mesh_of, random_batch, records, replace, shared_step, text_config

pytestmark = pytest.mark.usefixtures("shared_steps")

SMALL = replace(TINY, model__n_layers=1, train__global_batch=16, train__steps=8)
BAD = 3  # step, from 0
CASES = {
    "1 device": (SMALL, (1, 1, 1, 1)),
    "8 devices": (SMALL, (2, 2, 1, 2)),
    "2 microbatches": (replace(SMALL, train__grad_accum=2), (1, 8, 1, 1)),
}


POISONS = (("8 devices", np.nan), ("2 microbatches", np.nan), ("8 devices", np.inf))


def poisoned(batch, value):
    """Returns the batch with the weight of one token set to `value`, which is not finite."""
    weights = batch["weights"].copy()
    weights[5, 7] = value
    return {**batch, "weights": weights}


@functools.cache
def programs(name):
    config, shape = CASES[name]
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        return config, mesh, shared_step(config, mesh)


def run(name, batches, keep=()):
    """Returns the last state, the metrics by step, and the states before the steps in `keep`."""
    _, mesh, compiled = programs(name)
    with jax.set_mesh(mesh):
        state, metrics, kept = compiled.init(jax.random.key(0)), [], []
        for step, batch in enumerate(batches):
            if step in keep:
                kept.append(jax.device_get(state))
            placed = jax.device_put(batch, compiled.batch_sharding)
            state, found = compiled.train(state, placed)
            metrics.append(jax.device_get(found))
        return jax.device_get(state), metrics, kept


def assert_same_bits(left, right):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.view("u4"), b.view("u4")), left, right
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        case if case in POISONS else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(CASES, (np.nan, np.inf))
    ],
)
def test_one_bad_batch_is_as_if_it_had_not_been(name, value):
    good = [random_batch(SMALL, seed) for seed in range(6)]
    bad = poisoned(random_batch(SMALL, 99), value)
    state, metrics, (before, after) = run(
        name, [*good[:BAD], bad, *good[BAD:]], keep=(BAD, BAD + 1)
    )
    expected, undisturbed, _ = run(name, good)
    assert not np.isfinite(metrics[BAD]["loss"])
    # Exactly one step is skipped, and only the counters of steps change.
    assert [m["skipped"] for m in metrics] == [0] * BAD + [1] * 4
    assert [m["skipped_in_row"] for m in metrics] == [0] * BAD + [1] + [0] * 3
    assert_same_bits((after.params, after.opt_state), (before.params, before.opt_state))
    assert (int(before.step), int(after.step)) == (BAD, BAD + 1)
    assert (int(after.skips.last), int(after.skips.in_row)) == (BAD + 1, 1)
    # The following steps have the same weights, moments, counters, learning rates and windows.
    assert_same_bits((state.params, state.opt_state), (expected.params, expected.opt_state))
    assert_same_bits(state.skips.losses, expected.skips.losses)
    assert_same_bits(state.skips.grad_norms, expected.skips.grad_norms)
    assert int(state.step) == int(expected.step) + 1 == 7
    for name_of in ("loss", "grad_norm", "learning_rate"):
        found = [m[name_of] for m in metrics]
        assert found[:BAD] + found[BAD + 1 :] == [m[name_of] for m in undisturbed]


def test_why_it_was_skipped_is_kept():
    bad = poisoned(random_batch(SMALL, 99), np.nan)
    state, _, _ = run("1 device", [bad, random_batch(SMALL, 0)])
    assert explain(int(state.skips.reasons)) == (
        "the loss is not finite; gradients are not finite in embed, attn, mlp, norms, lm_head"
    )
    assert int(state.skips.in_row) == 0


# Whole runs.


def bad_from(monkeypatch, first, last):
    """Makes the weights of the batches of steps `first` to `last` (from 1) NaN.

    Returns:
      A dict that gets, by step, the time at which each bad batch was handed out.
    """
    stream, handed = loop.device_batches, {}

    def poisoning(source, start, stop, *rest):
        for step, batch in enumerate(stream(source, start, stop, *rest), start=start + 1):
            if stop == 12 and first <= step <= last:
                handed[step] = time.monotonic()
                batch = {**batch, "weights": batch["weights"] * jnp.nan}
            yield batch

    monkeypatch.setattr(loop, "device_batches", poisoning)
    return handed


@pytest.fixture
def run_config(corpus, shards):
    return text_config(
        corpus,
        data__path=str(shards),
        model__n_layers=1,
        mesh__fsdp=8,
        train__steps=12,
        train__eval_every=12,
        train__checkpoint_every=4,
        train__max_skipped=3,
    )


def test_a_run_passes_over_a_bad_batch(run_config, tmp_path, monkeypatch, capsys):
    """The skipped steps are counted in the log and in the checkpoint, also over a resume."""
    bad_from(monkeypatch, 4, 5)
    state = jax.device_get(run_lib.train(run_config, tmp_path))
    out = capsys.readouterr().out
    lines = [line for line in records(tmp_path) if "loss" in line]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, *[2] * 8]
    assert [line["loss"] is None for line in lines] == [4 <= n <= 5 for n in range(1, 13)]
    assert "skipped      2 steps made no update" in out
    assert "ETA -  skipped" not in out and "  skipped 2\n" in out
    for last in (4, 8):  # 4 was saved after a skipped step, 8 later
        for step in (4, 8, 12):
            if step > last and (folder := tmp_path / "checkpoints" / str(step)).exists():
                folder.rename(tmp_path / f"{last}-{step}")
    again = jax.device_get(run_lib.train(run_config, tmp_path))
    assert "resume  from step 4" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert (int(again.skips.total), int(again.skips.last)) == (2, 5)


@pytest.mark.parametrize(
    ("log_every", "checkpoint_every", "stopped"),
    [(1, 5, 9), (5, 4, 8)],
    ids=["by the log of step 8, while 9 runs", "by the save of step 8"],
)
def test_bad_batches_in_a_row_stop_the_run(
    run_config, tmp_path, monkeypatch, log_every, checkpoint_every, stopped
):
    config = replace(
        run_config, train__log_every=log_every, train__checkpoint_every=checkpoint_every
    )
    handed = bad_from(monkeypatch, 6, 12)
    with pytest.raises(UserError) as caught:
        run_lib.train(config, tmp_path)
    message = str(caught.value)
    print(f"told {time.monotonic() - handed[8]:.2f} s after the third batch: {message}")
    assert message.startswith(
        f"steps 6 to {stopped} made no update: the loss is not finite; gradients are not finite "
        f"in embed, attn, mlp, norms, lm_head. Batch of step {stopped}: sequences "
    )
    data = run_lib.open_data(config, tmp_path / "data")
    first = data.train.draws(stopped - 1, range(1))[0][1]
    assert f"sequences {first}, " in message and " and 2 more; see " in message
    assert f"--show=WORKDIR --step={stopped - 1}. " in message
    good = f"the last checkpoint is {checkpoint_every}; weights and moments are finite"
    assert f"Nothing was saved, {good}" in message
    assert find_step(tmp_path).name == str(checkpoint_every)
    # With a larger train.max_skipped, the run passes over them.
    patient = replace(config, train__max_skipped=99)
    assert int(run_lib.train(patient, tmp_path).skips.total) == 7


def test_a_bad_state_is_never_saved(run_config, tmp_path, monkeypatch):
    """A fault of the machine changes a weight between two steps."""
    jit_step_ = run_lib.jit_step

    def faulty(config, mesh, parts):
        compiled = jit_step_(config, mesh, parts)

        def train(state, batch):
            state, metrics = compiled.train(state, batch)
            return break_weight(state), metrics

        @jax.jit
        def break_weight(state):
            value = jnp.where(state.step == 7, jnp.nan, 0)
            params = {**state.params, "final_norm": state.params["final_norm"] + value}
            return state.replace(params=params)

        return dataclasses.replace(compiled, train=train)

    monkeypatch.setattr(run_lib, "jit_step", faulty)
    # One bad step is fewer than train.max_skipped, but its state would be saved.
    with pytest.raises(UserError, match=r"steps 8 to 8 .* is 4; weights of norms are not finite"):
        run_lib.train(run_config, tmp_path)
    assert find_step(tmp_path).name == "4"


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_spike_is_passed_over_where_that_is_asked_for(kind):
    """With `spike_factor`, the state stays as it was; without it, the update is made."""
    config = replace(SMALL, train__spike_factor=8.0, train__steps=40)
    mesh = mesh_of((1, 1, 1, 1))
    usual = random_batch(SMALL, 0)
    if kind == "loss":  # targets that never occurred in training
        bad = {**usual, "targets": (usual["targets"] + 1) % 64}
    else:  # the usual targets, but of one token: its gradient is noise
        weights = np.zeros_like(usual["weights"])
        weights[0, 0] = 1
        bad = {**usual, "weights": weights}
    with jax.set_mesh(mesh):
        compiled, plain = (
            shared_step(config, mesh),
            shared_step(replace(config, train__spike_factor=0.0), mesh),
        )
        state = compiled.init(jax.random.key(0))
        for _ in range(250):  # until loss and gradient norm no longer change
            state, _ = compiled.train(state, usual)
        assert int(state.skips.total) == 0
        before = jax.device_get(state)
        followed, metrics = plain.train(jax.device_put(before, plain.state_shardings), bad)
        assert int(followed.skips.total) == 0
        after, metrics = jax.device_get(compiled.train(state, bad))
        assert np.isfinite(metrics["loss"]) and metrics["skipped"] == 1
        assert explain(int(after.skips.reasons)).endswith("beyond train.spike_factor")
        assert_same_bits((after.params, after.opt_state), (before.params, before.opt_state))
        assert_same_bits(after.skips.losses, before.skips.losses)
        placed = jax.device_put(after, compiled.state_shardings)
        assert jax.device_get(compiled.train(placed, usual)[1])["skipped_in_row"] == 0
