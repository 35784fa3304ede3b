import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.train.bad_steps import (
    GROUPS,
    LOSS,
    OTHERS,
    SPIKE,
    WINDOW,
    explain,
    find_non_finite,
    group_norms,
    init_skips,
    skip_reasons,
    skips_after_rewind,
    updated,
)
from llama_jax.train.step import abstract_state, jit_step
from tests.helpers import TINY, made_state, mesh_of, random_batch, random_params, replace

GRADS = {"embed": jnp.ones(4), "layers": {"attn": {"wq": jnp.ones(2)}, "mlp_norm": jnp.ones(3)}}


def judged(skips, loss=2.0, grads=GRADS, norm=3.0, factor=0.0):
    return int(skip_reasons(skips, jnp.float32(loss), grads, jnp.float32(norm), factor))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value):
    assert judged(init_skips()) == 0
    assert judged(init_skips(), loss=value) == LOSS
    one = {**GRADS, "layers": {**GRADS["layers"], "mlp_norm": jnp.array([1, value, 1])}}
    assert explain(judged(init_skips(), grads=one)) == "gradients are not finite in norms"
    two = {**one, "embed": jnp.full(4, value)}
    assert explain(judged(init_skips(), grads=two)).endswith("in embed, norms")


def test_a_norm_that_overflows_only_in_sum_is_not_finite():
    half = jnp.full(1, 1.5e19)  # its square fits in float32, twice its square does not
    grads = {"embed": half, "lm_head": half}
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in grads.values()))
    assert np.isinf(norm) and np.isfinite(group_norms(grads)["embed"])
    assert judged(init_skips(), grads=grads, norm=norm) != 0


def filled(updates, rng=None):
    rng = rng or np.random.default_rng(0)
    skips = init_skips()
    advance = jax.jit(updated)
    for step in range(updates):
        loss, norm = 2 + 0.01 * rng.standard_normal(2).astype(np.float32)
        skips = advance(skips, jnp.int32(0), jnp.int32(step), loss, norm)
    return skips


@pytest.mark.parametrize(("loss", "norm"), [(2.2, 2.0), (2.0, 2.2)])
def test_a_spike_is_far_above_the_median_in_loss_or_norm(loss, norm):
    skips = filled(WINDOW + 5)
    deviation = 1.4826 * np.median(np.abs(skips.losses - np.median(skips.losses)))
    assert 0.008 < deviation < 0.012  # for a normal distribution this is the standard deviation
    assert judged(skips, loss, norm=norm) == 0  # the policy is off
    assert judged(skips, loss, norm=norm, factor=6.0) == SPIKE
    assert judged(skips, loss, norm=norm, factor=60.0) == 0
    bound = float(np.median(skips.losses) + 6 * deviation)
    assert judged(skips, bound - 1e-4, norm=2.0, factor=6.0) == 0
    assert judged(skips, bound + 1e-4, norm=2.0, factor=6.0) == SPIKE
    assert judged(skips, -5.0, norm=0.0, factor=6.0) == 0  # a value below the median is not a spike


def test_no_spike_before_half_of_the_window_is_known():
    for updates, expected in ((0, 0), (WINDOW // 2, 0), (WINDOW // 2 + 1, SPIKE)):
        assert judged(filled(updates), 100.0, factor=6.0) == expected


def test_a_loss_without_spread_is_no_trap():
    skips = init_skips().replace(losses=jnp.full(WINDOW, 2.0), grad_norms=jnp.full(WINDOW, 3.0))
    assert judged(skips, 2.01, factor=6.0) == 0
    assert judged(skips, 2.02, factor=6.0) == SPIKE


def test_the_window_holds_the_last_updates_and_no_skipped_step():
    skips = init_skips()
    for step in range(WINDOW + 3):
        reasons = jnp.int32(SPIKE if step in (5, 6, 70) else 0)
        value = jnp.float32(1e9 if step in (5, 6, 70) else step)
        skips = updated(skips, reasons, jnp.int32(step), value, value)
        if step == 6:
            assert (int(skips.total), int(skips.in_row), int(skips.last)) == (2, 2, 7)
    assert (int(skips.total), int(skips.in_row), int(skips.last)) == (3, 0, 71)
    assert sorted(skips.losses.tolist()) == [n for n in range(WINDOW + 3) if n not in (5, 6, 70)]


def test_a_rewind_is_a_longer_skip():
    """After a rewind, counters of updates go on from the checkpoint, counters of batches do not."""
    then, at = filled(WINDOW + 5), WINDOW + 5
    then = updated(then, jnp.int32(SPIKE), jnp.int32(at), jnp.float32(9), jnp.float32(9))
    step, skips = skips_after_rewind(then, jnp.int32(at + 1), jnp.int32(at + 40), jnp.int32(LOSS))
    assert (int(step), int(skips.total)) == (at + 40, 1 + 39)
    assert (int(skips.in_row), int(skips.last), int(skips.reasons)) == (0, at + 40, LOSS)
    none, value = jnp.int32(0), jnp.float32(7)
    on = updated(skips, none, step, value, value)
    expected = updated(then, none, jnp.int32(at + 1), value, value)
    assert on.losses.tolist() == expected.losses.tolist()
    assert on.grad_norms.tolist() == expected.grad_norms.tolist()


def test_groups_cover_the_parameters_and_their_norms_are_those_of_numpy():
    params = random_params(TINY.model)
    norms = group_norms(params)
    assert [*norms, OTHERS] == list(GROUPS)
    leaves = {
        "embed": [params["embed"]],
        "attn": list(params["layers"]["attn"].values()),
        "mlp": list(params["layers"]["mlp"].values()),
        "norms": [params["layers"][n] for n in ("attn_norm", "mlp_norm")] + [params["final_norm"]],
        "lm_head": [params["lm_head"]],
    }
    for name, arrays in leaves.items():
        expected = np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in arrays))
        assert float(norms[name]) == pytest.approx(expected, rel=1e-6)
    tied = abstract_state(replace(TINY, model__tied_embeddings=True)).params
    assert "lm_head" not in jax.eval_shape(group_norms, tied)


def test_a_state_that_is_broken_is_named():
    state = made_state(TINY)
    assert find_non_finite(state) == []
    broken = {**state.params, "lm_head": state.params["lm_head"].at[3, 3].set(jnp.nan)}
    assert find_non_finite(state.replace(params=broken)) == ["weights of lm_head"]
    moments = jax.tree.map(lambda m: m + jnp.inf if m.ndim == 2 else m, state.opt_state)
    assert find_non_finite(state.replace(opt_state=moments)) == ["moments"]


def test_norm_stats_are_of_the_gradient_and_of_what_was_moved():
    config, mesh = replace(TINY, train__norm_stats=True), mesh_of((2, 2, 1, 2))
    with jax.set_mesh(mesh):
        compiled = jit_step(config, mesh)
        before = compiled.init(jax.random.key(0))
        start = jax.device_get(before.params)
        state, metrics = compiled.train(before, random_batch(config, 0))
        end, metrics = jax.device_get((state.params, metrics))
        bad = random_batch(config, 1)
        bad["weights"][0, 0] = np.nan
        skipped = jax.device_get(compiled.train(state, bad)[1])
    named = [name for name in GROUPS if name != OTHERS]
    for name in named:
        assert skipped[f"update_norm/{name}"] == 0
        assert np.isnan(skipped[f"grad_norm/{name}"])
    squares = sum(metrics[f"grad_norm/{name}"] ** 2 for name in named)
    assert np.sqrt(squares) == pytest.approx(metrics["grad_norm"], rel=1e-5)
    moved = group_norms(jax.tree.map(np.subtract, end, start))
    for name in named:
        got = metrics[f"update_norm/{name}"]
        assert got == pytest.approx(float(moved[name]), rel=1e-3) and got > 0
