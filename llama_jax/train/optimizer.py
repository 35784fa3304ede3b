"""AdamW with clipping, a learning-rate schedule, and weight decay on matrices only.

Any other optax transformation can take its place, see `parts.Parts`. Its state is sharded
(`state_specs`), and does not change in a skipped step.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llama_jax.config import OptimConfig
from llama_jax.errors import UserError
from llama_jax.parallel.sharding import weight_shards
from llama_jax.parameters import PARAMETERS, SHARD, Table, path_of, row_of
from llama_jax.train.bad_steps import select
from llama_jax.train.parts import LLAMA_PARTS, Optimizer, Parts
from llama_jax.train.schedule import make_schedule

LARGE = 2**16  # an array with at least this many elements is sharded, not replicated


def decay_mask(params: Any, rows: Table = PARAMETERS) -> Any:
    """Marks the parameters that weight decay applies to: all but the scales of the norms.

    The rank cannot tell them apart: under the layer scan a norm's scale is a matrix (L, D).

    Args:
      params: a tree of parameters, or of adapters.
      rows: the table of the model's parameters.

    Returns:
      A tree of booleans, like `params`.
    """

    def decays(keys: Any, _: Any) -> bool:
        row = row_of(path_of(keys), rows)
        return row is None or row.decays

    return jax.tree.map_with_path(decays, params)


def make_optimizer(
    config: OptimConfig, steps: int, parts: Parts = LLAMA_PARTS
) -> optax.GradientTransformationExtraArgs:
    """Makes `parts.optimizer`, or by default clipping by global norm and AdamW (arXiv:1711.05101).

    The default follows the LLaMA paper, section 2.3. The optimiser's `update` also takes `skip`, a
    boolean scalar. If it is true, the state is returned unchanged, bit for bit, and the caller must
    not apply the updates.

    Args:
      config: the settings of the optimiser and its schedule.
      steps: length of the schedule, in optimiser steps.
      parts: may contain another optimiser, see `Parts`.

    Raises:
      UserError: `parts.optimizer` is not an optax transformation, and does not make one.
    """
    if parts.optimizer is not None:
        return _keeping_state(_transformation(parts.optimizer, make_schedule(config, steps)))
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        # The parts of `optax.adamw`, in its order and with its state.
        optax.chain(
            _scale_by_adam(config),
            optax.add_decayed_weights(
                config.weight_decay,
                functools.partial(decay_mask, rows=parts.architecture.parameters),
            ),
            _scale_by_learning_rate(make_schedule(config, steps)),
        ),
    )


def _transformation(chosen: Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns the given optax transformation, or the one that a given function makes.

    Raises:
      UserError: `chosen` is neither.
    """
    if isinstance(chosen, optax.GradientTransformation):
        return chosen
    made = chosen(schedule) if callable(chosen) else chosen
    if not isinstance(made, optax.GradientTransformation):
        raise UserError(
            "Parts.optimizer must be an optax transformation, or a function that makes one from a "
            f"schedule, such as optax.lion; got {made!r:.100}"
        )
    return made


def _keeping_state(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a transformation so that its state can be saved, and is kept in a skipped step."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        return jax.tree.map(_to_saved, inner.init(params))

    def update(
        grads: Any, state: Any, params: Any = None, *, skip: jax.Array | bool = False, **extra: Any
    ) -> tuple[Any, Any]:
        own = jax.tree.map(_from_saved, state, jax.eval_shape(inner.init, params))
        updates, after = inner.update(grads, own, params, **extra)
        after = jax.tree.map(_to_saved, after)
        # If a dtype changed, the next step would compile another program.
        after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)
        return updates, select(skip, state, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _to_saved(x: Any) -> jax.Array:
    """Returns an array of a state in a form that a checkpoint holds: a key as its numbers.

    A checkpoint holds no empty arrays: one number replaces each of them.
    """
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(x)
    return x if x.size else jnp.zeros((1,), x.dtype)


def _from_saved(x: jax.Array, original: Any) -> jax.Array:
    """Returns the array that `_to_saved` converted, given its shape and dtype."""
    if jnp.issubdtype(original.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(x)  # of JAX's default kind
    return x if original.size else jnp.zeros(original.shape, original.dtype)


def learning_rate(
    config: OptimConfig, steps: int, parts: Parts, update: jax.Array, opt_state: Any
) -> jax.Array:
    """Returns the learning rate of an update, float32; NaN if it is not known.

    Args:
      config: the settings of the schedule.
      steps: length of the schedule, in optimiser steps.
      parts: may contain another optimiser. One that a function makes follows the config's schedule.
        A ready-made one keeps its rate in its state only if `optax.inject_hyperparams` made it.
      update: number of updates before this one.
      opt_state: state of the optimiser after this update.
    """
    if not parts.follows_schedule:
        shown = optax.tree.get_all_with_path(opt_state, "learning_rate")
        return jnp.float32(shown[0][1] if shown else jnp.nan)
    return make_schedule(config, steps)(update)


def state_specs(opt_state: Any, params: Any, specs: Any, mesh: Mesh) -> Any:
    """Derives the partition specs of the state of any optimiser.

    An array that belongs to a parameter (its path contains the parameter's path) is sharded like
    it: each dimension that both have is divided in the same way. This covers moments, and factors
    such as Adafactor's, which lack some dimensions of the parameter. Any other large array is
    divided along the first dimension that fsdp x context divides; counters and small arrays are
    replicated.

    Args:
      opt_state: shapes and dtypes of the state.
      params: shapes and dtypes of the parameters.
      specs: partition specs of the parameters, a tree like `params`.
      mesh: the mesh.

    Returns:
      A tree of partition specs like `opt_state`.
    """
    leaves = zip(jax.tree.leaves_with_path(params), jax.tree.leaves(specs), strict=True)
    known = {path_of(keys): (leaf.shape, spec) for (keys, leaf), spec in leaves}
    longest = max(path.count("/") for path in known) + 1

    def spec_of(keys: tuple[Any, ...], leaf: Any) -> P:
        names = [str(key.key) if isinstance(key, jax.tree_util.DictKey) else "" for key in keys]
        for start in range(len(names)):
            for stop in range(min(len(names), start + longest), start, -1):
                if (path := "/".join(names[start:stop])) in known:
                    found = _shared(leaf.shape, *known[path])
                    return _spread(leaf.shape, mesh) if found is None else found
        return _spread(leaf.shape, mesh)

    return jax.tree.map_with_path(spec_of, opt_state)


def _shared(shape: tuple[int, ...], whole: tuple[int, ...], spec: P) -> P | None:
    """Returns the spec of an array that has some of a parameter's dimensions, in their order.

    A dimension of size 1 may replace one that was summed over. Returns None if the array has other
    dimensions.
    """
    if shape == whole:
        return spec
    entries = [*spec, *(None for _ in range(len(whole) - len(spec)))]
    if len(shape) == len(whole):
        triples = list(zip(shape, whole, entries, strict=True))
        if any(n not in (1, size) for n, size, _ in triples):
            return None
        return P(*(entry if n == size else None for n, size, entry in triples))
    for kept in itertools.combinations(range(len(whole)), len(shape)):
        if tuple(whole[place] for place in kept) == shape:
            return P(*(entries[place] for place in kept))
    return None


def _spread(shape: tuple[int, ...], mesh: Mesh) -> P:
    """Returns the spec of an array that belongs to no parameter."""
    parts = weight_shards(mesh.shape)
    if math.prod(shape) >= LARGE:
        for place, size in enumerate(shape):
            if size % parts == 0:
                return P(*(None for _ in range(place)), SHARD)
    return P()


def _scale_by_adam(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """Makes an `optax.scale_by_adam` that keeps its state in a skipped step.

    It selects the moments before it computes the updates from them. With a selection at the end,
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
    """Makes an `optax.scale_by_learning_rate` whose schedule does not count skipped steps."""
    scale = optax.scale_by_learning_rate(schedule)

    def update(
        updates: Any, state: Any, params: Any = None, *, skip: jax.Array | bool = False, **_: Any
    ) -> tuple[Any, Any]:
        updates, after = scale.update(updates, state, params)
        return updates, select(skip, state, after)

    return optax.GradientTransformationExtraArgs(scale.init, update)
