"""Sends a run that skips too many updates back to a checkpoint, or ends it with an error.

Going back is PaLM's remedy for loss spikes (arXiv:2204.02311, section 5.1): the run restores
weights and moments from a checkpoint before the spike, but the data do not go back, so the batches
around the spike are skipped. Only the numbers in the states decide when a run goes back and to
which checkpoint: the same command gives the same rewind, even if the run is stopped or killed and
restarted.
"""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.retention import can_rewind_to
from llama_jax.checkpoint.saved_step import DamagedCheckpoint
from llama_jax.config import Config
from llama_jax.data.training_data import TrainingData
from llama_jax.errors import UserError
from llama_jax.parallel.sharding import with_shardings
from llama_jax.train.bad_steps import explain, find_non_finite, skips_after_rewind
from llama_jax.train.step import TrainState


class Rewinder:
    """Decides when a run goes back to a checkpoint, and restores it.

    Between saves it uses only metrics that the loop has read for the log, so that the device never
    waits for it.

    Attributes:
      rewinds: the rewinds that led to the present state, as in `saved_step.StepMeta`.
    """

    def __init__(
        self, config: Config, data: TrainingData, saver: Checkpointer, rewinds: list[list[int]]
    ) -> None:
        self._config, self._data, self._saver = config, data, saver
        self.rewinds = rewinds
        self._in_row = 0  # number of updates skipped in a row, from the last logged step

    def at_start(self, state: TrainState) -> None:
        """Reads the first state as if its step had just been logged before a stop of the run."""
        logged = int(state.step) % self._config.train.log_every == 0
        self._in_row = int(state.skips.in_row) if logged else 0

    def on_read(self, values: Mapping[str, float | None]) -> None:
        """Reads the metrics of a logged step; `Metrics` calls it."""
        self._in_row = int(values.get("skipped_in_row") or 0)

    def take_skipped_in_a_row(self) -> int:
        """Returns how many updates in a row were skipped, if they are enough for a rewind.

        Returns:
          The number; 0 if it is below `train.max_skipped`, or if no step was logged since the last
          call.
        """
        in_row, self._in_row = self._in_row, 0
        return in_row if in_row >= self._config.train.max_skipped else 0

    def before_save(self, state: TrainState) -> None:
        """Checks a state before it is saved, by its own numbers; this waits for the device.

        Raises:
          UserError: `train.max_skipped` updates in a row were skipped and no rewind is possible; or
            the last update was skipped and the weights or moments are not finite.
        """
        in_row = int(state.skips.in_row)
        first = int(state.skips.last) - in_row + 1 if in_row else 0
        if in_row and find_non_finite(state):
            raise self._error(state, first)
        if in_row >= self._config.train.max_skipped and self._target(first) is None:
            raise self._error(state, first)

    def rewind(self, state: TrainState, in_row: int) -> TrainState:
        """Restores weights, moments and counters of an older checkpoint; the data do not go back.

        Args:
          state: the present state; it is deleted, because two states may not fit into memory.
          in_row: the last result of `take_skipped_in_a_row`.

        Raises:
          UserError: there is no checkpoint to go back to, or `train.max_rewinds` rewinds were made.
        """
        now, reasons = int(state.step), int(state.skips.reasons)
        first = now - in_row
        error = self._error(state, first)
        # The base of adapters never changes and is not restored.
        frozen, state = state.frozen, dataclasses.replace(state, frozen=None)
        shardings = jax.tree.map(lambda array: array.sharding, state)
        targets = with_shardings(state, shardings).to_items()
        while (target := self._target(first)) is not None:
            for array in jax.tree.leaves(state):
                array.delete()
            try:
                then = TrainState.from_items(self._saver.restore(target, targets))
                break
            except DamagedCheckpoint as damaged:
                self._saver.mark_damaged(target, str(damaged))
        else:
            raise error
        go_on = jax.jit(skips_after_rewind, out_shardings=(shardings.step, shardings.skips))
        step, skips = go_on(then.skips, then.step, np.int32(now), np.int32(reasons))
        self.rewinds = [*self.rewinds, [now, target]]
        self._in_row = 0  # the old number belongs to the state before the rewind
        why = explain(reasons)
        self._saver.report(
            now,
            f"rewound at step {now} to the weights of step {target}, skipping {now - target} "
            f"batches: steps from {first} on made no update: {why} (train.max_rewinds: "
            f"{len(self.rewinds)} of {self._config.train.max_rewinds})",
            **{"event": "rewound", "from": now, "to": target, "passed_over": now - target},
            reasons=why,
        )
        return TrainState(step, then.params, then.opt_state, skips, frozen)

    def _target(self, first: int) -> int | None:
        """Returns the checkpoint to go back to if `first` is the first skipped step, or None."""
        train = self._config.train
        if len(self.rewinds) >= train.max_rewinds:
            return None
        return self._saver.newest_good_step(
            lambda step: (
                step + train.rewind_steps <= first and can_rewind_to(step, train, self.rewinds)
            )
        )

    def _error(self, state: TrainState, first: int) -> UserError:
        """Returns the error: the steps, the reason, the last batch, the checkpoint and advice."""
        last, train = int(state.skips.last), self._config.train
        broken = find_non_finite(state)
        saved = self._saver.latest_step()
        good = "there is no checkpoint yet" if saved is None else f"the last checkpoint is {saved}"
        if broken:
            advice = (
                f"{' and '.join(broken)} are not finite: a batch cannot cause this, but a faulty "
                "device or program can. Run the same command to go on from the checkpoint"
            )
        else:
            advice = (
                "weights and moments are finite, as before these steps. Look at the batches and at "
                "optim.peak_lr; to skip more of them, raise --config.train.max_skipped"
            )
        if self.rewinds and len(self.rewinds) >= train.max_rewinds:
            advice += f"; train.max_rewinds={train.max_rewinds} rewinds were made"
        elif train.max_rewinds:
            advice += (
                f"; no good checkpoint of step {first - train.rewind_steps} or before is left to "
                f"rewind to (train.rewind_steps={train.rewind_steps})"
            )
        return UserError(
            f"steps {first} to {last} made no update: {explain(int(state.skips.reasons))}. "
            f"Batch of step {last}: {self._data.train.describe(last - 1)}. "
            f"Nothing was saved, {good}; {advice}"
        )
