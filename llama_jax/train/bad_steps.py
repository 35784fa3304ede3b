"""Skipped updates: the loss or the gradient norm is not finite, or far above its recent values.

A skipped step leaves weights, moments and the optimiser's counters unchanged, bit for bit, and
skips its batch: `TrainState.step`, which selects the batches, advances, but Adam's bias correction
and the learning rate count only the updates that were made. After a skip, the run therefore equals
a run that never had that batch.

A spike (`train.spike_factor`) is measured against medians of the last `WINDOW` steps that were not
skipped, so that a bad step does not influence the judgement of the next one. The decision is made
on the device and its data are in the state: a run that resumes from a checkpoint skips the same
steps again.

A rewind is a longer skip (`skips_after_rewind`; the module `rewind` decides when, and to which
checkpoint): the weights go back to a checkpoint, the data do not, and the batches between the two
are skipped.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llama_jax.parameters import PARAMETERS, Table, path_of, row_of

WINDOW = 128  # number of recent updates that a step is compared with
# Standard deviation of a normal distribution, in units of its median absolute deviation.
_SCALE = 1.4826
# Smallest spread, as a fraction of the median: a loss that hardly moves must not cause skips.
_LEAST_SPREAD = 1e-3

# The groups of parameters (`Parameter.group`) that the log and messages name, each with its bit of
# `Skips.reasons`, which is set if the gradient of the group is not finite. Arrays of a variant of
# the model that belong to none of these groups are in `OTHERS`.
OTHERS = "others"
GROUPS = {"embed": 1, "attn": 2, "mlp": 4, "norms": 8, "lm_head": 16, OTHERS: 128}
_EVERY = 31  # the bits of all groups of a LLaMA
LOSS, SPIKE = 32, 64  # further bits: the loss is not finite; a value exceeds spike_factor


@struct.dataclass
class Skips:
    """Counters of skipped steps, and recent losses and gradient norms; replicated on all devices.

    Attributes:
      total: number of skipped steps in the run, with those that a rewind passed over. int32.
      in_row: number of steps skipped since the last update. int32.
      last: the last skipped step, counted from 1 as in the log; 0: no step was skipped. int32.
      reasons: why that step was skipped, as bits, see `explain`. int32.
      losses: objectives of the last `WINDOW` updates; infinite in places not filled yet. float32.
      grad_norms: gradient norms of the same updates, before clipping. float32.
    """

    total: jax.Array
    in_row: jax.Array
    last: jax.Array
    reasons: jax.Array
    losses: jax.Array
    grad_norms: jax.Array

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by name, for a checkpoint."""
        return dict(vars(self))


def init_skips() -> Skips:
    """Returns the counters of a new run."""
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
    """Returns the reasons to skip this step, as bits; 0: the step is not skipped.

    A gradient norm above 1.8e19 counts as infinite, because its square overflows float32.

    Args:
      skips: the counters before the step.
      loss: the objective of the batch.
      grads: the gradient of the objective.
      grad_norm: norm of the whole gradient, before clipping.
      factor: number of robust standard deviations above the median that make a spike; 0: no value
        is a spike.
      rows: the table of the model's parameters.
    """
    bits = jnp.where(jnp.isfinite(loss), 0, LOSS)
    for name, norm in group_norms(grads, rows).items():
        bits |= jnp.where(jnp.isfinite(norm), 0, GROUPS[name])
    # The norm of the whole gradient can overflow although no norm of a group does.
    bits = jnp.where((bits == 0) & ~jnp.isfinite(grad_norm), _EVERY, bits)
    if factor:
        spike = (loss > _bound(skips.losses, factor)) | (
            grad_norm > _bound(skips.grad_norms, factor)
        )
        bits = jnp.where((bits == 0) & spike, SPIKE, bits)
    return bits


def _bound(usual: jax.Array, factor: float) -> jax.Array:
    """Returns the bound of a spike; NaN (no value is one) until half of the places are filled."""
    median = jnp.median(usual)
    spread = _SCALE * jnp.median(jnp.abs(usual - median))
    return median + factor * jnp.maximum(spread, _LEAST_SPREAD * median)


def updated(
    skips: Skips, reasons: jax.Array, step: jax.Array, loss: jax.Array, grad_norm: jax.Array
) -> Skips:
    """Returns the counters after a step.

    Args:
      skips: the counters before the step.
      reasons: the result of `skip_reasons`; 0: the step made its update.
      step: the number of the step, from 0.
      loss: the objective of the batch.
      grad_norm: norm of the whole gradient, before clipping.
    """
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
    """Returns the step and the counters to continue with after a rewind.

    The counters are those of a run that has skipped all steps after the checkpoint. The schedule
    and the places in the windows depend on `step - total`, so they are those of the checkpoint.

    Args:
      then: the counters in the checkpoint.
      at: the step of the checkpoint.
      now: number of steps taken when the run goes back.
      reasons: why the run goes back, as bits.
    """
    none = jnp.zeros((), jnp.int32)
    passed = then.total + now - at
    return now, dataclasses.replace(then, total=passed, in_row=none, last=now, reasons=reasons)


def select(skip: jax.Array | bool, before: Any, after: Any) -> Any:
    """Returns `before` if the step is skipped, or `after`.

    This is a selection and not a product with 0, because 0 * NaN is NaN.

    Args:
      skip: whether the step is skipped, a boolean scalar.
      before: a tree of arrays.
      after: a tree like `before`.
    """
    return jax.tree.map(lambda old, new: jnp.where(skip, old, new), before, after)


def explain(reasons: int) -> str:
    """Returns in words why a step was skipped; `reasons` are the bits of `skip_reasons`."""
    found = ["the loss is not finite"] if reasons & LOSS else []
    groups = [name for name, bit in GROUPS.items() if reasons & bit]
    if groups:
        found.append(f"gradients are not finite in {', '.join(groups)}")
    if reasons & SPIKE:
        found.append("loss or gradient norm is beyond train.spike_factor")
    return "; ".join(found)


def find_non_finite(state: Any) -> list[str]:
    """Lists the groups of weights, and the moments, of a `TrainState` that are not finite.

    It waits for the device. `select` keeps the results of bad steps out of the state, so a
    non-finite value there comes from a hardware fault or a bug.
    """

    @jax.jit
    def measure(params: Any, opt_state: Any) -> tuple[dict[str, jax.Array], jax.Array]:
        moments = [m for m in jax.tree.leaves(opt_state) if jnp.issubdtype(m.dtype, jnp.inexact)]
        sums = [jnp.sum(jnp.where(jnp.isfinite(m), 0, 1)) for m in moments]
        return group_norms(params), jnp.sum(jnp.stack(sums))

    norms, moments = jax.device_get(measure(state.params, state.opt_state))
    found = [f"weights of {name}" for name, norm in norms.items() if not math.isfinite(norm)]
    return found + (["moments"] if moments else [])
