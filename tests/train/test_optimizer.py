import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.config import OptimConfig
from llama_jax.train.optimizer import decay_mask, make_optimizer
from llama_jax.train.schedule import make_schedule
from llama_jax.train.step import abstract_state
from tests.helpers import TINY, replace


def test_everything_but_norms_decays():
    mask = decay_mask(abstract_state(TINY).params)
    flat = {
        "/".join(key.key for key in path): value for path, value in jax.tree.leaves_with_path(mask)
    }
    assert {name for name, decays in flat.items() if not decays} == {
        "layers/attn_norm",
        "layers/mlp_norm",
        "final_norm",
    }


def step_from(config, params, grads):
    optimizer = make_optimizer(config, 100)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state


PARAMS = {"embed": jnp.full((2, 2), 2.0), "final_norm": jnp.full((2,), 2.0)}


def test_first_step_by_hand():
    config = OptimConfig(peak_lr=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=100.0)
    grads = {"embed": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "final_norm": jnp.array([1.0, -1.0])}
    params, _ = step_from(config, PARAMS, grads)
    # Adam's first step is the sign of the gradient; decay adds lr * 0.5 * 2 to matrices.
    np.testing.assert_allclose(
        params["embed"], 2 - 0.1 * (np.sign(grads["embed"]) + 0.5 * 2), rtol=1e-6
    )
    np.testing.assert_allclose(params["final_norm"], 2 - 0.1 * np.array([1, -1]), rtol=1e-6)


def test_clipping_is_by_the_global_norm():
    config = OptimConfig(peak_lr=0.1, warmup_steps=0, clip_norm=1.0, beta1=0.9)
    grads = {"embed": jnp.full((2, 2), 3.0), "final_norm": jnp.full((2,), 4.0)}
    _, state = step_from(config, PARAMS, grads)
    mu = next(
        s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")
    )
    norm = math.sqrt(4 * 9 + 2 * 16)
    np.testing.assert_allclose(mu["embed"], 0.1 * 3 / norm, rtol=1e-5)
    np.testing.assert_allclose(mu["final_norm"], 0.1 * 4 / norm, rtol=1e-5)


def random_grads(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), PARAMS)


def assert_same_bits(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == other.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_and_state_are_those_of_optax(dtype):
    config = OptimConfig(peak_lr=0.1, warmup_steps=2, weight_decay=0.5, moment_dtype=dtype)
    reference = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, 100),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            mu_dtype=jnp.dtype(dtype),
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
    optimizer = make_optimizer(config, 100)
    state, expected_state = optimizer.init(PARAMS), reference.init(PARAMS)
    for seed in range(4):
        grads = random_grads(seed)
        updates, state = optimizer.update(grads, state, PARAMS, skip=jnp.array(False))
        expected, expected_state = reference.update(grads, expected_state, PARAMS)
        assert_same_bits((updates, state), (expected, expected_state))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_skipped_update_keeps_the_state(dtype):
    optimizer = make_optimizer(OptimConfig(warmup_steps=2, moment_dtype=dtype), 100)
    _, state = optimizer.update(random_grads(0), optimizer.init(PARAMS), PARAMS)
    grads = jax.tree.map(lambda x: x.at[0].set(jnp.nan), random_grads(1))
    _, after = optimizer.update(grads, state, PARAMS, skip=jnp.array(True))
    assert_same_bits(after, state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_moment_has_the_chosen_dtype(dtype):
    state = abstract_state(replace(TINY, optim__moment_dtype=dtype)).opt_state
    adam = next(
        s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype("float32")}
