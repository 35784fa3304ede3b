"""What a researcher may exchange in a training: architecture, loss, optimiser, metrics.

`Parts` goes into `step.jit_step` or `run.run`. Nothing global is assigned, and steps with other
parts exist beside each other in one process.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import optax

from llama_jax.config import Config
from llama_jax.model.llama import LLAMA, Architecture
from llama_jax.model.loss import cross_entropy

Batch = dict[str, jax.Array]
# Objective, cross-entropy and weight, summed over tokens; and, if a loss has further ones, a dict
# of sums by name, which are logged as means.
LossSums = tuple[Any, ...]
Loss = Callable[[jax.Array, jax.Array, Batch, Config], LossSums]


def next_token_loss(
    hidden_BTD: jax.Array, head_DV: jax.Array, batch: Batch, config: Config
) -> LossSums:
    """Computes the loss of LLaMA: cross-entropy with the next token, plus `train.z_loss`.

    Only the first of its sums, the objective, has a gradient (see `loss.cross_entropy`): build
    another loss on that.

    Args:
      hidden_BTD: last hidden states; logits are `hidden_BTD @ head_DV`.
      head_DV: output matrix.
      batch: arrays B T, see `step`.
      config: of the run.
    """
    return cross_entropy(
        hidden_BTD,
        head_DV,
        batch["targets"],
        batch["weights"],
        chunk=config.train.loss_chunk,
        z_loss=config.train.z_loss,
    )


@dataclasses.dataclass(frozen=True)
class StepView:
    """What a metric sees of a step, inside the compiled program.

    Attributes:
      params: what the step began with; with LoRA, the adapters.
      grads: mean gradient of the batch, before clipping.
      updates: what is added to the parameters; 0 if the step is skipped.
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
# A transformation, or a function that makes one from the config's learning rate by step, such as
# `optax.lion`.
Optimizer: TypeAlias = (
    optax.GradientTransformation | Callable[[optax.Schedule], optax.GradientTransformation]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a training; by default those of LLaMA.

    Attributes:
      architecture: the module of a layer, and the table of its parameters.
      loss: (hidden_BTD, head_DV, batch, config) -> objective, cross-entropy and weight, each
        summed over the tokens of a (micro)batch; and optionally a dict of further sums, whose
        means per weighted token are logged by name. The gradient is that of the objective; the
        validation loss is the cross-entropy.
      optimizer: an optax transformation, or a function that makes one from the schedule of
        `optim.peak_lr`, such as `optax.lion`; None: AdamW as `optim` says. Of the fields of
        `optim`, only those of the schedule have an effect on another optimiser.
      metrics: scalars to log, by name: functions of `StepView`. They are shown on the console.
      shown: names of the loss's further sums that are shown on the console, too.
    """

    architecture: Architecture = LLAMA
    loss: Loss = next_token_loss
    optimizer: Optimizer | None = None
    metrics: Mapping[str, Metric] = dataclasses.field(default_factory=dict)
    shown: tuple[str, ...] = ()

    def names(self) -> dict[str, str]:
        """Names the parts that are not LLaMA's, for a checkpoint; metrics change no result."""
        found = {"architecture": self.architecture.name}
        if self.loss is not next_token_loss:
            found["loss"] = _name(self.loss)
        if self.optimizer is not None:
            found["optimizer"] = _name(self.optimizer)
        return {kind: name for kind, name in found.items() if name}


def _name(part: Any) -> str:
    """The qualified name of a function; of another object, that of its class."""
    inner = part if hasattr(part, "__qualname__") else type(part)
    return f"{inner.__module__}.{inner.__qualname__}"


LLAMA_PARTS = Parts()
