import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.train.step import abstract_batch, abstract_state, state_shardings
from tests.helpers import MESHES, TINY, mesh_of, meshes, random_batch, replace, shared_step

STEPS = 5


def losses_and_state(config, mesh, steps=STEPS):
    with jax.set_mesh(mesh):
        compiled = shared_step(config, mesh)
        state = compiled.init(jax.random.key(0))
        losses = []
        for step in range(steps):
            batch = jax.device_put(random_batch(config, step), compiled.batch_sharding)
            state, metrics = compiled.train(state, batch)
            losses.append(float(metrics["loss"]))
        return np.array(losses), jax.device_get(state), jax.device_get(metrics)


@functools.cache
def unsharded():
    return losses_and_state(TINY, mesh_of((1, 1, 1, 1)))


# By default: microbatches alone, three axes alone, and both together. The other cases are slow.
PLACEMENTS = [
    ((1, 1, 1, 1), 4),
    ((2, 2, 1, 2), 1),
    ((1, 2, 2, 2), 2),
]


@pytest.mark.parametrize(
    ("shape", "grad_accum"),
    [
        case if case in PLACEMENTS else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(MESHES, [1, 2, 4])
        if case != ((1, 1, 1, 1), 1)
    ],
)
def test_sharding_and_accumulation_are_only_placement(shape, grad_accum):
    config = replace(TINY, train__grad_accum=grad_accum)
    losses, state, _ = losses_and_state(config, mesh_of(shape))
    expected, expected_state, _ = unsharded()
    np.testing.assert_allclose(losses, expected, rtol=0, atol=2e-6)
    assert losses[0] - losses[-1] != 0
    # Adam divides by the size of the gradient, so rounding shows first in weights of tiny
    # gradients.
    for got, want in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-3)


def test_microbatches_with_unequal_masks_weigh_by_tokens():
    batch = random_batch(TINY, 0)
    # Rows 0, 4, 8, .. make the first of four microbatches; almost no token of it has weight.
    batch["weights"][0::4] = 0
    batch["weights"][0, 0] = 1

    def first_step(grad_accum):
        mesh = mesh_of((1, 1, 1, 1))
        with jax.set_mesh(mesh):
            compiled = shared_step(replace(TINY, train__grad_accum=grad_accum), mesh)
            state = compiled.init(jax.random.key(0))
            _, metrics = compiled.train(state, batch)
            return jax.device_get(metrics)

    whole, parts = first_step(1), first_step(4)
    assert parts["loss"] == pytest.approx(whole["loss"], abs=2e-6)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    assert parts["tokens"] == batch["weights"].sum()


def test_metrics_of_a_step():
    _, state, metrics = unsharded()
    assert set(metrics) == {
        *("loss", "objective", "grad_norm", "learning_rate", "tokens"),
        *("skipped", "skipped_in_row"),
    }
    assert metrics["objective"] == pytest.approx(metrics["loss"])
    assert int(state.step) == STEPS
    from llama_jax.train.schedule import make_schedule

    schedule = make_schedule(TINY.optim, TINY.train.steps)
    assert metrics["learning_rate"] == pytest.approx(float(schedule(STEPS - 1)))


def test_it_learns():
    config = replace(TINY, train__steps=30)
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        compiled = shared_step(config, mesh)
        state = compiled.init(jax.random.key(0))
        batch = random_batch(config, 0, masked=False)
        losses = []
        for _ in range(30):
            state, metrics = compiled.train(state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(64), abs=0.1)
    assert losses[-1] < losses[0] - 1


def test_z_loss_is_in_the_objective_only():
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        compiled = shared_step(replace(TINY, train__z_loss=0.1), mesh)
        batch = random_batch(TINY, 0)
        _, metrics = compiled.train(compiled.init(jax.random.key(0)), batch)
        _, plain = shared_step(TINY, mesh).train(compiled.init(jax.random.key(0)), batch)
    assert float(metrics["loss"]) == float(plain["loss"])
    # At the start log Z is about log V, on every token.
    extra = float(metrics["objective"] - metrics["loss"])
    assert extra == pytest.approx(0.1 * np.log(64) ** 2, rel=0.02)


def test_a_batch_without_weights_changes_nothing_to_nan():
    mesh = mesh_of((1, 1, 1, 1))
    batch = random_batch(TINY, 0)
    batch["weights"][:] = 0
    with jax.set_mesh(mesh):
        compiled = shared_step(TINY, mesh)
        state, metrics = compiled.train(compiled.init(jax.random.key(0)), batch)
    assert float(metrics["loss"]) == 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 1, 2)])
def test_evaluation_gives_sums(shape):
    mesh = mesh_of(shape)
    batch = random_batch(TINY, 1)
    with jax.set_mesh(mesh):
        compiled = shared_step(TINY, mesh)
        state = compiled.init(jax.random.key(0))
        total, weight = compiled.evaluate(state.params, batch)
        _, metrics = compiled.train(state, batch)
    assert float(weight) == batch["weights"].sum()
    assert float(total / weight) == pytest.approx(float(metrics["loss"]), abs=2e-6)


def test_the_state_is_donated_and_sharded():
    mesh = mesh_of((1, 8, 1, 1))
    with jax.set_mesh(mesh):
        compiled = shared_step(TINY, mesh)
        state = compiled.init(jax.random.key(0))
        assert len(state.params["embed"].sharding.device_set) == 8
        assert state.params["embed"].addressable_shards[0].data.shape == (64, 4)
        after, _ = compiled.train(state, random_batch(TINY, 0))
    assert state.params["embed"].is_deleted()
    assert after.params["embed"].sharding == compiled.state_shardings.params["embed"]


def test_the_state_is_updated_in_place():
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        lowered = shared_step(TINY, mesh).train.lower(abstract_state(TINY), abstract_batch(TINY))
    text = lowered.compile().as_text()
    model = TINY.model
    for rows, columns in [(model.vocab_size, model.dim), (model.dim, model.vocab_size)]:
        shape = f"f32[{rows},{columns}]"  # embed or lm_head, and their moments
        assert shape in text
        assert not re.search(re.escape(shape) + r"\S* copy\(", text), shape


@pytest.mark.parametrize("shape", meshes((1, 2, 2, 2)))
def test_bfloat16_on_a_mesh(shape):
    config = replace(TINY, model__compute_dtype="bfloat16")
    losses, _, _ = losses_and_state(config, mesh_of(shape))
    expected, _, _ = losses_and_state(config, mesh_of((1, 1, 1, 1)))
    # bfloat16 has 8 bits of precision, and gradients are summed in another order.
    np.testing.assert_allclose(losses, expected, atol=2e-3)


def test_moments_lie_with_their_parameters():
    mesh = mesh_of((2, 2, 1, 2))
    state = state_shardings(abstract_state(TINY), mesh)
    moments = [
        part
        for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    ]
    assert len(moments) == 1
    assert moments[0].mu == moments[0].nu == state.params
    assert moments[0].count.spec == jax.P()
    assert state.step.spec == jax.P()
