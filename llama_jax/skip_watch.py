"""Stops a run that makes no more updates, and says why; keeps bad states out of checkpoints."""

from collections.abc import Mapping
from typing import Protocol

from llama_jax.config import Config
from llama_jax.data.identity import identify
from llama_jax.data.pipeline import TrainingData
from llama_jax.errors import UserError
from llama_jax.skips import explain, not_finite
from llama_jax.step import TrainState


class Saver(Protocol):
    """What is asked of a `Checkpointer`."""

    def latest_step(self) -> int | None:
        """Newest complete step, or None."""


class SkipWatch:
    """Looks at what the loop has read anyway: it never makes the device wait."""

    def __init__(self, config: Config, data: TrainingData, saver: Saver) -> None:
        self._config, self._data, self._saver = config, data, saver

    def after_log(self, state: TrainState, read: Mapping[str, float | None] | None) -> None:
        """Judges by the metrics of a step that were just logged, if any were.

        Raises:
          UserError: `train.max_skipped` updates in a row were skipped by then.
        """
        if read and (read.get("skipped_in_row") or 0) >= self._config.train.max_skipped:
            raise self._error(state)

    def before_save(self, state: TrainState) -> None:
        """Looks at the state itself, as saving is about to do.

        Raises:
          UserError: as `after_log`; or the weights or moments are not finite.
        """
        in_row = int(state.skips.in_row)
        if in_row >= self._config.train.max_skipped or (in_row and not_finite(state)):
            raise self._error(state)

    def _error(self, state: TrainState) -> UserError:
        """What is known: when, why, on which text, what is still good, and how to go on."""
        skips = state.skips
        last, in_row = int(skips.last), int(skips.in_row)
        if not in_row:  # an update was made since the metrics were
            in_row = self._config.train.max_skipped
        broken = not_finite(state)
        saved = self._saver.latest_step()
        good = "there is no checkpoint yet" if saved is None else f"the last checkpoint is {saved}"
        if broken:
            advice = (
                f"{' and '.join(broken)} are not finite: no batch does that, a faulty device or "
                "program may. Run the same command to go on from the checkpoint"
            )
        else:
            advice = (
                "weights and moments are finite, as before these steps. Look at the batches and at "
                "optim.peak_lr; to pass over more of them, raise --config.train.max_skipped"
            )
        return UserError(
            f"steps {last - in_row + 1} to {last} made no update: {explain(int(skips.reasons))}. "
            f"Batch of step {last}: {identify(self._data.train, self._config, last)}. "
            f"Nothing was saved, {good}; {advice}"
        )
