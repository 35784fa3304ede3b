"""The exchangeable parts of a training: architecture, loss, optimiser, metrics.

Pass `Parts` to `step.jit_step` or `run.run`. Nothing global is assigned, so steps with different
parts can exist in one process at the same time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from llama_jax.config import Config
from llama_jax.errors import UserError
from llama_jax.model.llama import LLAMA, Architecture
from llama_jax.model.loss import cross_entropy

Batch = dict[str, jax.Array]
# Further names in the records of `metrics.jsonl`, see `instruments.metrics`.
RESERVED = ("step", "event", "eval_loss", "goodput", "tokens_per_second", "mfu", "chip_seconds")
# Objective, cross-entropy and weight, each summed over tokens; a fourth item is optional: a dict of
# further sums by name, which are logged as means.
LossSums = tuple[Any, ...]
Loss = Callable[[jax.Array, jax.Array, Batch, Config], LossSums]


def next_token_loss(
    hidden_BTD: jax.Array, head_DV: jax.Array, batch: Batch, config: Config
) -> LossSums:
    """Computes the loss of LLaMA: cross-entropy with the next token, plus the z-loss.

    Only the first sum, the objective, has a gradient (see `loss.cross_entropy`): a loss that builds
    on this one must use the objective.

    Args:
      hidden_BTD: last hidden states; the logits are `hidden_BTD @ head_DV`.
      head_DV: output matrix.
      batch: arrays B T, see `step`.
      config: the config of the run; `train.z_loss` is the weight of the z-loss.

    Returns:
      Objective, cross-entropy and weight, each summed over tokens.
    """
    return cross_entropy(
        hidden_BTD,
        head_DV,
        batch["targets"],
        batch["weights"],
        chunk=config.train.loss_chunk,
        z_loss=config.train.z_loss,
    )


def check_sums(sums: Any, loss: Loss) -> LossSums:
    """Checks that a loss has returned what `Parts.loss` describes; returns it.

    Raises:
      UserError: it has returned something else.
    """
    good = isinstance(sums, tuple) and len(sums) in (3, 4)
    if good and len(sums) == 4:
        good = isinstance(sums[3], Mapping)
    if not good or any(jnp.shape(value) for value in jax.tree.leaves(sums)):
        raise UserError(
            f"the loss {_name(loss)} must return three scalars (objective, cross-entropy and "
            "weight, summed over tokens), and may add a dict of scalars; it returned "
            f"{jax.tree.map(jnp.shape, sums)}"
        )
    return sums


def with_metrics(metrics: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a researcher's metrics to those of a step.

    Raises:
      UserError: a name is taken, or a value is not a scalar.
    """
    for name, value in more.items():
        if name in metrics or name in RESERVED or name.startswith("epochs"):
            raise UserError(f"the log has a metric {name!r} already; choose another name")
        if jnp.shape(value):
            raise UserError(f"the metric {name!r} must be a scalar; its shape is {value.shape}")
    return {**metrics, **more}


@dataclasses.dataclass(frozen=True)
class StepView:
    """The values of a step that a metric can use, inside the compiled program.

    Attributes:
      params: the parameters before the step; with LoRA, the adapters.
      grads: mean gradient of the batch, before clipping.
      updates: the updates that are added to the parameters; 0 if the step is skipped.
      batch: the global batch, arrays B T.
      loss: mean cross-entropy per weighted token, in nats.
      tokens: sum of the weights of the batch.
    """

    params: Any
    grads: Any
    updates: Any
    batch: Batch
    loss: jax.Array
    tokens: jax.Array


Metric = Callable[[StepView], jax.Array]
# A transformation, or a function that makes one from the config's learning-rate schedule, such as
# `optax.lion`.
Optimizer: TypeAlias = (
    optax.GradientTransformation | Callable[[optax.Schedule], optax.GradientTransformation]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a training; by default those of LLaMA.

    Attributes:
      architecture: the module of a layer, and the table of the parameters.
      loss: (hidden_BTD, head_DV, batch, config) -> objective, cross-entropy and weight, each
        summed over the tokens of a (micro)batch; and optionally a dict of further sums, whose
        means per weighted token are logged by name. The objective is minimised; the validation
        loss is the cross-entropy.
      optimizer: an optax transformation, or a function that makes one from the schedule of
        `optim`, such as `optax.lion`; None: AdamW with the settings in `optim`. Only the
        schedule's fields of `optim` have an effect on an optimiser given here.
      metrics: functions of `StepView` by name, each returning a scalar, which is logged and shown
        on the console.
      shown: names of the loss's further sums that the console shows too.
    """

    architecture: Architecture = LLAMA
    loss: Loss = next_token_loss
    optimizer: Optimizer | None = None
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    shown: tuple[str, ...] = ()

    @property
    def follows_schedule(self) -> bool:
        """Says whether the learning rate is that of `optim`; a ready-made optimiser has its own."""
        return not isinstance(self.optimizer, optax.GradientTransformation)

    def names(self) -> dict[str, str]:
        """Returns the names of the parts that are not LLaMA's; metrics do not affect the result."""
        found = {"architecture": self.architecture.name}
        if self.loss is not next_token_loss:
            found["loss"] = _name(self.loss)
        if self.optimizer is not None:
            found["optimizer"] = _name(self.optimizer)
        return {kind: name for kind, name in found.items() if name}


def _name(part: Any) -> str:
    """Returns the qualified name of a function, or of the class of another object."""
    inner = part if hasattr(part, "__qualname__") else type(part)
    return f"{inner.__module__}.{inner.__qualname__}"


LLAMA_PARTS = Parts()
