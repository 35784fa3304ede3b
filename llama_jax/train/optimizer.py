"""AdamW with warm-up, cosine decay, clipping, and weight decay on matrices only."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax.config import OptimConfig
from llama_jax.parameters import PARAMETERS, Table, path_of, row_of
from llama_jax.train.bad_steps import select


def decay_mask(params: Any, rows: Table = PARAMETERS) -> Any:
    """Marks the parameters that weight decay applies to: all but the scales of the norms.

    It is not inferred from the rank, since under the layer scan a norm's scale is a matrix (L, D).

    Args:
      params: a tree of parameters, or of adapters.
      rows: the table of the model.

    Returns:
      A tree of booleans, like `params`.
    """

    def decays(keys: Any, _: Any) -> bool:
        row = row_of(path_of(keys), rows)
        return row is None or row.decays

    return jax.tree.map_with_path(decays, params)


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by optimiser step: linear warm-up, then cosine to a fraction of the peak.

    The rate of step s (from 0) is `schedule(s)`: it reaches the peak at `warmup_steps` and
    `final_lr_fraction` of it at `steps`. Warm-up starts at peak / (warmup_steps + 1), not at 0, so
    that the first step learns.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=config.peak_lr / (config.warmup_steps + 1),
        peak_value=config.peak_lr,
        warmup_steps=config.warmup_steps,
        decay_steps=steps,
        end_value=config.peak_lr * config.final_lr_fraction,
    )


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW (arXiv:1711.05101) as in the LLaMA paper, section 2.3.

    Its `update` also takes `skip`, a boolean scalar. Where it is true, the state comes back as it
    was, bit for bit, and the caller must not apply the updates.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        # The parts of `optax.adamw`, in its order and with its state.
        optax.chain(
            _scale_by_adam(config),
            optax.add_decayed_weights(config.weight_decay, decay_mask),
            _scale_by_learning_rate(make_schedule(config, steps)),
        ),
    )


def _scale_by_adam(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` that keeps its state on a skipped step.

    It selects the moments before it computes the updates from them. After a selection at the end,
    both the new weights and the new moments would read the old moments, and XLA:CPU would copy each
    old moment before it overwrites it.
    """
    dtype = jnp.dtype(config.moment_dtype)

    def update(
        grads: Any,
        state: optax.ScaleByAdamState,
        params: Any = None,
        *,
        skip: jax.Array | bool = False,
        **_: Any,
    ) -> tuple[Any, optax.ScaleByAdamState]:
        mu = optax.tree.update_moment(grads, state.mu, config.beta1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, config.beta2, 2)
        mu, nu = select(skip, (state.mu, state.nu), (mu, nu))
        count = optax.safe_increment(state.count)
        updates = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + config.eps),
            optax.tree.bias_correction(mu, config.beta1, count),
            optax.tree.bias_correction(nu, config.beta2, count),
        )
        count = select(skip, state.count, count)
        return updates, optax.ScaleByAdamState(count, optax.tree.cast(mu, dtype), nu)

    init = optax.scale_by_adam(mu_dtype=dtype).init
    return optax.GradientTransformationExtraArgs(init, update)


def _scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate`, whose schedule counts no skipped step."""
    scale = optax.scale_by_learning_rate(schedule)

    def update(
        updates: Any, state: Any, params: Any = None, *, skip: jax.Array | bool = False, **_: Any
    ) -> tuple[Any, Any]:
        updates, after = scale.update(updates, state, params)
        return updates, select(skip, state, after)

    return optax.GradientTransformationExtraArgs(scale.init, update)
