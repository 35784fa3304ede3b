"""AdamW with warm-up, cosine decay, clipping, and weight decay on matrices only."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax.config import OptimConfig

# Named, not inferred from the rank: under the layer scan a norm's scale is a matrix (L, D).
NO_DECAY = ("attn_norm", "mlp_norm", "final_norm")


def decay_mask(params: Any) -> Any:
    """True for parameters that weight decay applies to: all but the norms' scales."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in NO_DECAY, params)


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


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (arXiv:1711.05101) as in the LLaMA paper, section 2.3."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            mu_dtype=jnp.dtype(config.moment_dtype),
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
