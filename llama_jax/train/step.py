"""One optimiser step and one evaluation step: pure functions without I/O, and their jitted forms.

A batch is a dict of arrays of shape (global_batch, seq_len): `inputs` and `targets` (int32 token
ids; a target is the next token of its input) and `weights` (float32, 0 for a target that does not
count); with packed documents also `segment_ids` and `positions` (int32).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from llama_jax.config import Config
from llama_jax.model.llama import forward
from llama_jax.model.weights import abstract_frozen, combined, init_trained
from llama_jax.parallel.sharding import (
    batch_sharding,
    constrain,
    named_shardings,
    param_shardings,
    param_specs,
    with_shardings,
)
from llama_jax.parameters import PARAMETERS, Table
from llama_jax.train.bad_steps import Skips, group_norms, init_skips, select, skip_reasons, updated
from llama_jax.train.optimizer import learning_rate, make_optimizer, state_specs
from llama_jax.train.parts import (
    LLAMA_PARTS,
    Batch,
    LossSums,
    Parts,
    StepView,
    check_sums,
    with_metrics,
)

_DROPOUT = 0x64726F70  # makes the keys of dropout differ from those of the initial adapters


@struct.dataclass
class TrainState:
    """The state of a training: everything that a step changes, and the frozen base.

    Attributes:
      step: number of batches taken, by updates and by skipped steps. int32.
      params: nested dict of float32 arrays.
      opt_state: state of the optimiser, see `optimizer.make_optimizer`.
      skips: counters of the steps that made no update.
      frozen: with LoRA, the base in the form of `lora.to_frozen`, which no step changes and no
        checkpoint holds; `params` are then the adapters. None without LoRA.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skips: Skips = struct.field(default_factory=init_skips)
    frozen: Any = None

    def to_items(self) -> dict[str, Any]:
        """Returns the trees of a checkpoint by the names of its items; without the base."""
        return {
            "params": self.params,
            "optimizer": {"step": self.step, "opt_state": self.opt_state},
            "skips": self.skips.to_dict(),
        }

    @classmethod
    def from_items(cls, items: dict[str, Any]) -> "TrainState":
        """Returns the state, without a base, whose `to_items` returned these items."""
        return cls(params=items["params"], **items["optimizer"], skips=Skips(**items["skips"]))


def init_state(config: Config, key: jax.Array, parts: Parts = LLAMA_PARTS) -> TrainState:
    """Makes the state before the first step, without a base; the same bits on every mesh.

    Args:
      config: the config of the run.
      key: the random key of the initial weights.
      parts: the parts of the training, see `Parts`.
    """
    params = init_trained(config, key, parts.architecture)
    opt_state = make_optimizer(config.optim, config.train.steps, parts).init(params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)


def model_weights(state: TrainState, config: Config, parts: Parts = LLAMA_PARTS) -> Any:
    """Returns the weights of a state for `llama.forward`, see `weights.combined`.

    Args:
      state: the state, or a tree like it, such as its shardings.
      config: the config of the run.
      parts: the parts of the training, see `Parts`.
    """
    return combined(state.params, state.frozen, config, parts.architecture)


def _dropout_key(config: Config, step: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(config.train.seed), _DROPOUT)
    return jax.random.fold_in(key, step)


def _loss_sums(params: Any, batch: Batch, config: Config, parts: Parts = LLAMA_PARTS) -> LossSums:
    """Computes the sums of `Parts.loss` over the tokens of a (micro)batch."""
    hidden_BTD, head_DV, _ = forward(
        config.model,
        params,
        batch["inputs"],
        positions_BT=batch.get("positions"),
        segment_ids_BT=batch.get("segment_ids"),
        dropout_key=batch.get("dropout_key"),
    )
    return check_sums(parts.loss(hidden_BTD, head_DV, batch, config), parts.loss)


def _microbatches(batch: Batch, count: int) -> Batch:
    """Splits a batch: B T -> A B/A T.

    Microbatch a takes the rows a, a + A, ..: each device splits its own rows.
    """

    def split(x_BT: jax.Array) -> jax.Array:
        x_ABT = x_BT.reshape(x_BT.shape[0] // count, count, *x_BT.shape[1:]).swapaxes(0, 1)
        return constrain(x_ABT, None, "batch", "seq")

    return jax.tree.map(split, batch)


def _gradients(
    params: Any,
    batch: Batch,
    config: Config,
    frozen: Any = None,
    dropout_key: jax.Array | None = None,
    parts: Parts = LLAMA_PARTS,
) -> tuple[LossSums, Any]:
    """Computes mean objective, mean loss, weight and mean gradient of a batch in microbatches.

    Further sums that the loss returns follow the weight, as a dict of means.

    Microbatches are part of the step, in place of `optax.MultiSteps`: the sums are divided by the
    weight of the whole batch, which is right for microbatches with unequal masks, while MultiSteps
    takes the mean of their means; and a step is one dispatch for any accumulation. The weight is
    summed over devices together with the loss; computed before, it would be a separate collective,
    which could run at the same time as those of the layers.
    """

    def sums_and_gradients(microbatch: Batch) -> tuple[LossSums, Any]:
        def objective(params: Any) -> tuple[jax.Array, LossSums]:
            weights = combined(params, frozen, config, parts.architecture)
            sums = _loss_sums(weights, microbatch, config, parts)
            return sums[0], sums

        grads, sums = jax.grad(objective, has_aux=True)(params)
        return sums, grads

    def body(total: tuple[LossSums, Any], microbatch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, sums_and_gradients(microbatch)), None

    count = config.train.grad_accum
    keys = {}
    if dropout_key is not None:  # each microbatch has its own key
        keys["dropout_key"] = dropout_key if count == 1 else jax.random.split(dropout_key, count)
    if count == 1:
        sums, grads = sums_and_gradients({**batch, **keys})
    else:

        def microbatches() -> Batch:
            return {**_microbatches(batch, count), **keys}

        def first() -> tuple[LossSums, Any]:
            return sums_and_gradients(jax.tree.map(lambda x: x[0], microbatches()))

        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(first))
        (sums, grads), _ = jax.lax.scan(body, start, microbatches())
    objective, entropy, weight, *others = sums
    scale = 1 / jnp.maximum(weight, 1.0)
    means = (objective * scale, entropy * scale, weight)
    means += tuple(jax.tree.map(lambda total: total * scale, others))
    return means, jax.tree.map(lambda gradient: gradient * scale, grads)


def train_step(
    state: TrainState, batch: Batch, *, config: Config, parts: Parts = LLAMA_PARTS
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Makes one optimiser step on a global batch; skips it if its loss or gradient is unusable.

    Args:
      state: the state before the step.
      batch: arrays B T, see above.
      config: the config of the run.
      parts: the parts of the training, see `Parts`.

    Returns:
      The next state, and metrics as float32 scalars: `loss` (mean cross-entropy per weighted token,
      in nats), `objective` (loss plus z-loss), `grad_norm` (before clipping), `learning_rate`,
      `tokens` (sum of the weights), `skipped` (steps so far) and `skipped_in_row`; with
      `train.norm_stats` also `grad_norm/GROUP` and `update_norm/GROUP` of each group of weights;
      and the metrics that the loss and `parts.metrics` add.
    """
    train, skips, rows = config.train, state.skips, parts.architecture.parameters
    key = _dropout_key(config, state.step) if config.lora.rank and config.lora.dropout else None
    means, grads = _gradients(state.params, batch, config, state.frozen, key, parts)
    objective, loss, tokens, *others = means
    grad_norm = optax.tree.norm(grads)
    reasons = skip_reasons(skips, objective, grads, grad_norm, train.spike_factor, rows)
    optimizer = make_optimizer(config.optim, train.steps, parts)
    skip = reasons != 0
    updates, opt_state = optimizer.update(
        grads, state.opt_state, state.params, skip=skip, value=objective
    )
    # The selection is here so that XLA makes it part of AdamW's one pass over the state.
    params = select(skip, state.params, optax.apply_updates(state.params, updates))
    after = updated(skips, reasons, state.step, objective, grad_norm)
    metrics = {
        "loss": loss,
        "objective": objective,
        "grad_norm": grad_norm,
        # The schedule counts updates, not batches.
        "learning_rate": learning_rate(
            config.optim, train.steps, parts, state.step - skips.total, opt_state
        ),
        "tokens": tokens,
        "skipped": after.total.astype(jnp.float32),
        "skipped_in_row": after.in_row.astype(jnp.float32),
    }
    for sums in others:
        metrics = with_metrics(metrics, sums)
    if train.norm_stats or parts.metrics:
        moved = select(skip, jax.tree.map(jnp.zeros_like, updates), updates)
    if train.norm_stats:
        for kind, tree in (("grad_norm", grads), ("update_norm", moved)):
            metrics |= {f"{kind}/{name}": norm for name, norm in group_norms(tree, rows).items()}
    if parts.metrics:
        view = StepView(state.params, grads, moved, batch, loss, tokens)
        values = {name: metric(view) for name, metric in parts.metrics.items()}
        metrics = with_metrics(metrics, values)
    return TrainState(state.step + 1, params, opt_state, after, state.frozen), metrics


def eval_step(
    params: Any, batch: Batch, *, config: Config, parts: Parts = LLAMA_PARTS
) -> tuple[jax.Array, jax.Array]:
    """Computes cross-entropy and weight of a batch, each summed over tokens.

    Sum both over batches, then divide.

    Args:
      params: the weights, as `model_weights` returns them.
      batch: arrays B T, see above.
      config: the config of the run.
      parts: the parts of the training, see `Parts`.
    """
    _, entropy, weight, *_ = _loss_sums(params, batch, config, parts)
    return entropy, weight


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """Jitted `init_state`, `train_step` and `eval_step` for one config on one mesh.

    Attributes:
      config: the config that they were made for.
      parts: the parts that they were made for.
      state_shardings: sharding of each array of the `TrainState`.
      batch_sharding: sharding of the arrays of a batch.
      init: key -> TrainState without a base; the state never exists unsharded.
      train: (state, batch) -> (state, metrics); the given state is donated.
      evaluate: (params, batch) -> (summed loss, summed weight).
    """

    config: Config
    parts: Parts
    state_shardings: Any
    batch_sharding: Any
    init: Any
    train: Any
    evaluate: Any

    def weights(self, state: TrainState) -> Any:
        """Returns the weights of a state for `evaluate` and `llama.forward`."""
        return model_weights(state, self.config, self.parts)

    def placed_state(self, *, base: bool = True) -> TrainState:
        """Returns shapes, dtypes and shardings of the state; allocates nothing.

        Args:
          base: whether to include the frozen base of adapters; False: only what is saved.
        """
        state, shardings = abstract_state(self.config, self.parts), self.state_shardings
        if base:
            frozen = abstract_frozen(self.config, self.parts.architecture)
            state = dataclasses.replace(state, frozen=frozen)
        else:
            shardings = dataclasses.replace(shardings, frozen=None)
        return with_shardings(state, shardings)


def abstract_state(config: Config, parts: Parts = LLAMA_PARTS) -> TrainState:
    """Returns shapes and dtypes of the state that is saved, without a base; allocates nothing."""
    return jax.eval_shape(lambda key: init_state(config, key, parts), jax.random.key(0))


def abstract_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and dtypes of the global batches of the config's data, see `data.loader`."""
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "weights": jnp.float32}
    if config.data.packing == "best_fit" and config.data.source != "synthetic":
        dtypes |= {"segment_ids": jnp.int32, "positions": jnp.int32}
    shape = (config.train.global_batch, config.train.seq_len)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def state_shardings(state: Any, mesh: Mesh, rows: Table = PARAMETERS) -> Any:
    """Derives the shardings of a whole `TrainState`, see `optimizer.state_specs`.

    Args:
      state: shapes and dtypes of a `TrainState`.
      mesh: the mesh.
      rows: the table of the model's parameters.

    Raises:
      UserError: see `param_specs`.
    """
    specs = param_specs(state.params, mesh, rows=rows)
    opt_specs = state_specs(state.opt_state, state.params, specs, mesh)
    skips = jax.tree.map(lambda _: jax.P(), state.skips)
    return named_shardings(
        state.replace(step=jax.P(), params=specs, opt_state=opt_specs, skips=skips), mesh
    )


def jit_step(config: Config, mesh: Mesh, parts: Parts = LLAMA_PARTS) -> CompiledStep:
    """Jits the pure functions for a mesh; call it inside `jax.set_mesh(mesh)`.

    Args:
      config: the config of the run.
      mesh: the devices.
      parts: the parts of the training, see `Parts`.

    Raises:
      UserError: a parameter does not divide over the mesh, or has no row in the table.
    """
    rows = parts.architecture.parameters
    saved = state_shardings(abstract_state(config, parts), mesh, rows)
    frozen = abstract_frozen(config, parts.architecture)
    base = None if frozen is None else param_shardings(frozen, mesh, rows=rows)
    states = saved.replace(frozen=base)
    batch = batch_sharding(mesh)
    replicated = jax.sharding.NamedSharding(mesh, jax.P())
    return CompiledStep(
        config=config,
        parts=parts,
        state_shardings=states,
        batch_sharding=batch,
        init=jax.jit(functools.partial(init_state, config, parts=parts), out_shardings=saved),
        train=jax.jit(
            functools.partial(train_step, config=config, parts=parts),
            in_shardings=(states, batch),
            out_shardings=(states, replicated),
            donate_argnums=0,
        ),
        evaluate=jax.jit(
            functools.partial(eval_step, config=config, parts=parts),
            in_shardings=(model_weights(states, config, parts), batch),
            out_shardings=replicated,
        ),
    )
