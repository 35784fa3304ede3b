"""The schedule of the learning rate: a linear warm-up, then the shape that `optim.schedule` names.

The rate of optimiser step s, counted from 0, is `schedule(s)`. The warm-up is the same in all
schedules. `constant` and `wsd` give the same bits until the decay of `wsd` begins: a run may train
with `constant`, and several runs of `wsd` may continue from its checkpoints, each as if the whole
run were `wsd`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from llama_jax.config import OptimConfig


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Makes the schedule of the learning rate, as a function of the number of earlier updates.

    The warm-up begins at peak / (warmup_steps + 1), not at 0, so that the first step learns, and
    reaches the peak at `warmup_steps`. The rate at `steps` is also that of all later steps.

    Args:
      config: the settings of the schedule.
      steps: length of the schedule, in optimiser steps.
    """
    first = config.peak_lr / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=first,
            peak_value=config.peak_lr,
            warmup_steps=config.warmup_steps,
            decay_steps=steps,
            end_value=_final_rate(config),
        )
    after = _AFTER_WARM_UP[config.schedule](config, steps)
    # One product has the same bits in every program. `optax.linear_schedule` adds to a product, and
    # a compiler may merge the two operations in the program of `constant` but not in that of `wsd`.
    return optax.join_schedules([lambda step: first * (step + 1), after], [config.warmup_steps])


def _final_rate(config: OptimConfig) -> float:
    return config.peak_lr * config.final_lr_fraction


def _fall(config: OptimConfig, steps: int, shape: str) -> optax.Schedule:
    """Makes a fall from the peak to the final rate.

    Args:
      config: the settings of the schedule.
      steps: length of the fall.
      shape: a name in `_SHAPES`.
    """
    final = _final_rate(config)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        # The quotient is clipped, not the count: where a compiler multiplies by 1 / steps, it may
        # be more than 1 at the end, and the rate negative.
        done = jnp.clip(count / steps, 0, 1)
        return final + (config.peak_lr - final) * _SHAPES[shape](done)

    return schedule


def _linear(config: OptimConfig, steps: int) -> optax.Schedule:
    return _fall(config, steps - config.warmup_steps, "linear")


def _constant(config: OptimConfig, steps: int) -> optax.Schedule:
    return optax.constant_schedule(config.peak_lr)


def _wsd(config: OptimConfig, steps: int) -> optax.Schedule:
    """Makes the schedule warm-up, stable, decay (arXiv:2405.18392)."""
    length = config.decay_length(steps)
    fall = _fall(config, length, config.decay_shape)
    stable = steps - length - config.warmup_steps
    return optax.join_schedules([_constant(config, steps), fall], [stable])


def _inverse_sqrt(config: OptimConfig, steps: int) -> optax.Schedule:
    """Makes a decay with the square root of the step: peak * sqrt(warmup_steps / step).

    Without a warm-up it is peak * sqrt(1 / step), and the peak at step 0.
    """
    first = max(config.warmup_steps, 1)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.clip(count + config.warmup_steps, first, steps)
        return config.peak_lr * jnp.sqrt(first / step)

    return schedule


# What remains of the fall when the fraction t of its steps is done.
_SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda t: 1 - t,
    "1-sqrt": lambda t: 1 - jnp.sqrt(t),
}
# Each makes the schedule of the steps after the warm-up, counted from its end. Cosine is missing,
# because optax has it with its warm-up.
_AFTER_WARM_UP: dict[str, Callable[[OptimConfig, int], optax.Schedule]] = {
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}
