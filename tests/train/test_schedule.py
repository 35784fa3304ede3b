"""Schedules of the learning rate, against optax's pieces and plain formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.config import OptimConfig
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.schedule import make_schedule

PEAK, LOW, STEPS, DECAY = 3e-4, 3e-5, 40, 12
WARMUPS = (0, 1, 7)
SCHEDULES = {
    "cosine": {},
    "linear": {},
    "constant": {},
    "inverse_sqrt": {},
    "wsd": {"decay_steps": DECAY},
    "wsd, linear": {"decay_steps": DECAY, "decay_shape": "linear"},
    "wsd, default length": {},
}


def config_of(name, warmup, **changes):
    given = {"schedule": name.partition(",")[0], "final_lr_fraction": 0.1} | SCHEDULES[name]
    return OptimConfig(peak_lr=PEAK, warmup_steps=warmup, **given | changes)


def rates(schedule, steps=STEPS + 5):
    """Returns the rates of the first steps, and of some beyond the end, from one program."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps, dtype=jnp.int32)))


def formula(name, warmup):
    """Returns the rates in float64."""
    step = np.minimum(np.arange(STEPS + 5, dtype=np.float64), STEPS)
    length = DECAY if SCHEDULES[name] else STEPS // 5
    done = (step - warmup) / (STEPS - warmup)
    last = np.clip((step - STEPS + length) / length, 0, 1)
    shape = {
        "cosine": 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * done)),
        "linear": 1 - 0.9 * done,
        "constant": np.ones_like(step),
        "inverse_sqrt": np.sqrt(max(warmup, 1) / np.maximum(step, 1)),
        "wsd": 0.1 + 0.9 * (1 - np.sqrt(last)),
        "wsd, linear": 0.1 + 0.9 * (1 - last),
    }
    shape["wsd, default length"] = shape["wsd"]
    return PEAK * np.where(step < warmup, (step + 1) / (warmup + 1), shape[name])


def joined(name, warmup):
    """Returns the schedule, joined from optax's pieces."""
    length = DECAY if SCHEDULES[name] else STEPS // 5
    falling = {
        "cosine": optax.cosine_decay_schedule(PEAK, STEPS - warmup, 0.1),
        "linear": optax.linear_schedule(PEAK, LOW, STEPS - warmup),
        "constant": optax.constant_schedule(PEAK),
        "inverse_sqrt": lambda count: PEAK / jnp.sqrt(ratio_to(max(warmup, 1), count + warmup)),
        "wsd": lambda count: PEAK - (PEAK - LOW) * jnp.sqrt(jnp.clip(count / length, 0, 1)),
        "wsd, linear": optax.linear_schedule(PEAK, LOW, length),
    }
    falling["wsd, default length"] = falling["wsd"]
    pieces, ends = [optax.linear_schedule(PEAK / (warmup + 1), PEAK, warmup)], [warmup]
    if name.startswith("wsd"):
        pieces, ends = [*pieces, optax.constant_schedule(PEAK)], [warmup, STEPS - length]
    return optax.join_schedules([*pieces, falling[name]], ends)


def ratio_to(first, step):
    return jnp.clip(step, first, STEPS) / first


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_of_every_step(name, warmup):
    found = rates(make_schedule(config_of(name, warmup), STEPS))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, formula(name, warmup), rtol=1e-6)
    np.testing.assert_allclose(found, rates(joined(name, warmup)), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("cosine", LOW),
        ("linear", LOW),
        ("constant", PEAK),
        ("inverse_sqrt", PEAK * (7 / STEPS) ** 0.5),
        ("wsd", LOW),
        ("wsd, linear", LOW),
    ],
)
def test_the_ends_of_a_schedule(name, end):
    schedule = make_schedule(config_of(name, 7), STEPS)
    assert float(schedule(0)) == pytest.approx(PEAK / 8)
    assert float(schedule(7)) == pytest.approx(PEAK)
    if name.startswith("wsd"):
        assert float(schedule(STEPS - DECAY)) == pytest.approx(PEAK)
        assert float(schedule(STEPS - DECAY + 1)) < 0.95 * PEAK
    for step in (STEPS, STEPS + 1, 10 * STEPS, 2**31 - 1):
        assert float(schedule(step)) == pytest.approx(end), step


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_warm_up_starts_at_the_peak(name):
    assert float(make_schedule(config_of(name, 0), STEPS)(0)) == pytest.approx(PEAK)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "wsd, linear"])
def test_a_rate_may_fall_to_zero(name):
    found = rates(make_schedule(config_of(name, 1, final_lr_fraction=0.0), STEPS))
    assert found[STEPS:] == pytest.approx(0, abs=1e-6 * PEAK)
    assert (found >= 0).all() and (np.diff(found[1:]) <= 0).all()


@pytest.mark.parametrize("warmup", WARMUPS)
def test_cosine_is_the_program_of_optax(warmup):
    expected = optax.warmup_cosine_decay_schedule(
        init_value=PEAK / (warmup + 1),
        peak_value=PEAK,
        warmup_steps=warmup,
        decay_steps=STEPS,
        end_value=PEAK * 0.1,
    )
    one, other = (
        jax.jit(schedule).lower(jnp.int32(0)).as_text()
        for schedule in (make_schedule(OptimConfig(PEAK, 0.1, warmup), STEPS), expected)
    )
    assert one == other


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("shape", ["1-sqrt", "linear"])
def test_constant_and_wsd_have_the_same_bits_until_the_decay(shape, warmup):
    """The run with `constant` may also have another length."""
    begin = STEPS - DECAY
    wsd = make_schedule(config_of("wsd", warmup, decay_shape=shape), STEPS)
    constant = make_schedule(config_of("constant", warmup), 10 * STEPS)
    one, other = (jax.jit(schedule) for schedule in (wsd, constant))
    for step in map(jnp.int32, range(begin)):
        assert np.asarray(one(step)).tobytes() == np.asarray(other(step)).tobytes(), step
    assert rates(wsd)[:begin].tobytes() == rates(constant)[:begin].tobytes()
    assert (rates(wsd)[begin + 1 : STEPS] < rates(constant)[begin + 1 : STEPS]).all()


def test_a_run_with_constant_continues_as_wsd():
    """Weights and moments are those of a run that has `wsd` from the beginning."""
    begin, params = STEPS - DECAY, {"embed": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)}
    wsd = config_of("wsd", 3)

    @functools.partial(jax.jit, static_argnames=("config", "steps"))
    def update(params, state, config, steps):
        grads = jax.tree.map(lambda x: jnp.sin(3 * x) + x**2, params)
        updates, state = make_optimizer(config, steps).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def trained(config, steps):
        now = (params, make_optimizer(config, steps).init(params))
        for step in range(STEPS):
            now = update(*now, *((config, steps) if step < begin else (wsd, STEPS)))
        return jax.tree.leaves(now)

    one, other = trained(config_of("constant", 3), 10 * STEPS), trained(wsd, STEPS)
    assert [leaf.tobytes() for leaf in map(np.asarray, one)] == [
        leaf.tobytes() for leaf in map(np.asarray, other)
    ]
