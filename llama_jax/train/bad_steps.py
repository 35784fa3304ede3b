"""Updates that are not made: the loss or the gradient is not finite, or far above what was usual.

A skipped step leaves weights, moments and the optimiser's counters as they were, bit for bit, and
passes over its batch: `TrainState.step`, which the data follow, goes on, while Adam's bias
correction and the learning rate follow the updates that were made. After a skip a run is therefore
the run that never met that batch.

What counts as a spike (`train.spike_factor`) is told by medians of the last `WINDOW` steps that
were not skipped, so that no bad step has a part in judging the next one. All of it is decided on
the device and kept in the state: a run that goes on from a checkpoint skips the same steps again.

A rewind (`skips_after_rewind`; when and where to, see `rewind`) is a longer skip: the weights go
back to a checkpoint, the data do not, and all batches between are passed over.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llama_jax.parameters import PARAMETERS, Table, path_of, row_of

WINDOW = 128  # steps that say what is usual
# Median absolute deviation to standard deviation of a normal distribution.
_SCALE = 1.4826
# Of the median: a loss that hardly moves has no spread, and is no reason to skip.
_LEAST_SPREAD = 1e-3

# The groups of parameters (`Parameter.group`) that have a name in the log and in messages, each
# with the bit of `Skips.reasons` that says that its gradient is not finite. A variant of the model
# may have arrays of other groups.
OTHERS = "others"
GROUPS = {"embed": 1, "attn": 2, "mlp": 4, "norms": 8, "lm_head": 16, OTHERS: 128}
_EVERY = 31  # all groups of a LLaMA
LOSS, SPIKE = 32, 64  # further bits: the loss is not finite, or something is beyond spike_factor


@struct.dataclass
class Skips:
    """What was skipped, and what was usual; a few hundred numbers, on every device.

    Attributes:
      total: skipped steps of the run, int32; and steps that a rewind passed over.
      in_row: those since the last update, int32.
      last: the last one, counted from 1 as in the log; 0: none. int32.
      reasons: why, as bits: see `explain`. int32.
      losses: of the last `WINDOW` updates; infinite where there was none yet. float32.
      grad_norms: the same, before clipping.
    """

    total: jax.Array
    in_row: jax.Array
    last: jax.Array
    reasons: jax.Array
    losses: jax.Array
    grad_norms: jax.Array

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for a checkpoint."""
        return dict(vars(self))


def init_skips() -> Skips:
    """Of a run that begins."""
    zeros = (jnp.zeros((), jnp.int32) for _ in range(4))
    empty = (jnp.full(WINDOW, jnp.inf, jnp.float32) for _ in range(2))
    return Skips(*zeros, *empty)


def group_norms(tree: Any, rows: Table = PARAMETERS) -> dict[str, jax.Array]:
    """Computes the norm of each group of parameters, gradients or updates, over all layers."""
    sums: dict[str, Any] = {}
    for keys, leaf in jax.tree.leaves_with_path(tree):
        row = row_of(path_of(keys), rows)
        group = row.group if row is not None and row.group in GROUPS else OTHERS
        sums[group] = sums.get(group, 0.0) + jnp.sum(jnp.square(leaf))
    return {name: jnp.sqrt(sums[name]) for name in GROUPS if name in sums}


def skip_reasons(
    skips: Skips,
    loss: jax.Array,
    grads: Any,
    grad_norm: jax.Array,
    factor: float,
    rows: Table = PARAMETERS,
) -> Any:
    """Why this step is to be skipped, as bits; 0: it is not.

    The square of a norm beyond 1.8e19 is no float32, so such a gradient counts as infinite.

    Args:
      skips: of the state before the step.
      loss: of the batch.
      grads: its gradient.
      grad_norm: over all of it, before clipping.
      factor: deviations from the median that make a spike; 0: nothing is one.
      rows: the table of the model.
    """
    bits = jnp.where(jnp.isfinite(loss), 0, LOSS)
    for name, norm in group_norms(grads, rows).items():
        bits |= jnp.where(jnp.isfinite(norm), 0, GROUPS[name])
    # The norm of all may overflow where those of the groups do not.
    bits = jnp.where((bits == 0) & ~jnp.isfinite(grad_norm), _EVERY, bits)
    if factor:
        spike = (loss > _bound(skips.losses, factor)) | (
            grad_norm > _bound(skips.grad_norms, factor)
        )
        bits = jnp.where((bits == 0) & spike, SPIKE, bits)
    return bits


def _bound(usual: jax.Array, factor: float) -> jax.Array:
    """Above it is a spike; not a number, so that nothing is, while half of the places are empty."""
    median = jnp.median(usual)
    spread = _SCALE * jnp.median(jnp.abs(usual - median))
    return median + factor * jnp.maximum(spread, _LEAST_SPREAD * median)


def updated(
    skips: Skips, reasons: jax.Array, step: jax.Array, loss: jax.Array, grad_norm: jax.Array
) -> Skips:
    """The counts after a step (from 0) that `skip_reasons` gave these reasons to skip, or none."""
    skip = reasons != 0
    place = (step - skips.total) % WINDOW
    return Skips(
        total=skips.total + skip,
        in_row=jnp.where(skip, skips.in_row + 1, 0),
        last=jnp.where(skip, step + 1, skips.last),
        reasons=jnp.where(skip, reasons, skips.reasons),
        losses=jnp.where(skip, skips.losses, skips.losses.at[place].set(loss)),
        grad_norms=jnp.where(skip, skips.grad_norms, skips.grad_norms.at[place].set(grad_norm)),
    )


def skips_after_rewind(
    then: Skips, at: jax.Array, now: jax.Array, reasons: jax.Array
) -> tuple[jax.Array, Skips]:
    """The step and the counts to go on with, at the batch `now`, from a checkpoint of step `at`.

    As if all steps after it had been skipped: the schedule and the places in the windows, which
    follow `step - total`, are those of the checkpoint.

    Args:
      then: of the checkpoint.
      at: its step.
      now: steps taken when the run goes back.
      reasons: why it does.
    """
    none = jnp.zeros((), jnp.int32)
    passed = then.total + now - at
    return now, dataclasses.replace(then, total=passed, in_row=none, last=now, reasons=reasons)


def select(skip: jax.Array | bool, before: Any, after: Any) -> Any:
    """`before` where the step is skipped: a selection, since 0 * NaN would be NaN."""
    return jax.tree.map(lambda old, new: jnp.where(skip, old, new), before, after)


def explain(reasons: int) -> str:
    """Why a step was skipped, in words."""
    found = ["the loss is not finite"] if reasons & LOSS else []
    groups = [name for name, bit in GROUPS.items() if reasons & bit]
    if groups:
        found.append(f"gradients are not finite in {', '.join(groups)}")
    if reasons & SPIKE:
        found.append("loss or gradient norm is beyond train.spike_factor")
    return "; ".join(found)


def find_non_finite(state: Any) -> list[str]:
    """Which weights, by group, and moments of a `TrainState` are not finite; waits for them.

    What `select` guards can only get there by a fault of a machine, or of ours.
    """

    @jax.jit
    def measure(params: Any, opt_state: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        moments = [m for m in jax.tree.leaves(opt_state) if jnp.issubdtype(m.dtype, jnp.inexact)]
        sums = [jnp.sum(jnp.where(jnp.isfinite(m), 0, 1)) for m in moments]
        return group_norms(params), jnp.sum(jnp.stack(sums))

    norms, moments = jax.device_get(measure(state.params, state.opt_state))
    found = [f"weights of {name}" for name, norm in norms.items() if not math.isfinite(norm)]
    return found + (["moments"] if moments else [])
