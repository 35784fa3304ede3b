"""Batches that give a loss or a gradient that nobody should follow (rows 17, 18 and 19)."""

import functools

import jax
import numpy as np
import pytest

from llama_jax.skips import explain
from llama_jax.step import jit_step
from tests.helpers import TINY, mesh_of, random_batch, replace

SMALL = replace(TINY, model__n_layers=1, train__global_batch=16, train__steps=8)
BAD = 3  # of the steps from 0
CASES = {
    "1 device": (SMALL, (1, 1, 1, 1)),
    "8 devices": (SMALL, (2, 2, 1, 2)),
    "2 microbatches": (replace(SMALL, train__grad_accum=2), (1, 8, 1, 1)),
}


def poisoned(batch, value):
    """One weight of one token is no number that a loss should be multiplied with."""
    weights = batch["weights"].copy()
    weights[5, 7] = value
    return {**batch, "weights": weights}


@functools.cache
def programs(name):
    config, shape = CASES[name]
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        return config, mesh, jit_step(config, mesh)


def run(name, batches, keep=()):
    """The last state, metrics of each step, and the states before the steps in `keep`."""
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


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", CASES)
def test_one_bad_batch_is_as_if_it_had_not_been(name, value):
    good = [random_batch(SMALL, seed) for seed in range(6)]
    bad = poisoned(random_batch(SMALL, 99), value)
    state, metrics, (before, after) = run(
        name, [*good[:BAD], bad, *good[BAD:]], keep=(BAD, BAD + 1)
    )
    expected, undisturbed, _ = run(name, good)
    assert not np.isfinite(metrics[BAD]["loss"])
    # Exactly one step is skipped, and nothing but the counts of steps has changed.
    assert [m["skipped"] for m in metrics] == [0] * BAD + [1] * 4
    assert [m["skipped_in_row"] for m in metrics] == [0] * BAD + [1] + [0] * 3
    assert_same_bits((after.params, after.opt_state), (before.params, before.opt_state))
    assert (int(before.step), int(after.step)) == (BAD, BAD + 1)
    assert (int(after.skips.last), int(after.skips.in_row)) == (BAD + 1, 1)
    # The following steps: weights, moments, counters, learning rates, what is usual.
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
