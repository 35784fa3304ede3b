"""The loop around the step: batches, evaluation, saving and logging, in a fixed order."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.saved_step import StepMeta
from llama_jax.config import Config, Stage, changed_fields
from llama_jax.data.loader import device_batches
from llama_jax.data.training_data import TrainingData
from llama_jax.parallel.multihost import compile_together, say
from llama_jax.train.changes import listed
from llama_jax.train.instruments import metrics
from llama_jax.train.instruments.goodput import Goodput
from llama_jax.train.instruments.profiler import Profiler
from llama_jax.train.instruments.signals import StopRequest
from llama_jax.train.instruments.watchdog import Watchdog
from llama_jax.train.rewind import Rewinder
from llama_jax.train.stage_steps import same_program, step_of_stage
from llama_jax.train.step import Batch, CompiledStep, TrainState


def mean_validation_loss(
    compiled: CompiledStep,
    params: Any,
    data: TrainingData,
    config: Config,
    stop: StopRequest,
    watchdog: Watchdog,
) -> float | None:
    """Computes the mean validation loss per token, in nats, over at most `eval_batches` batches.

    Args:
      compiled: the jitted evaluation step and its mesh.
      params: the weights, as `CompiledStep.weights` returns them.
      data: contains the validation batches.
      config: sets the number of batches and their shape, that of the stage of the run.
      stop: checked after each batch.
      watchdog: receives a beat before each batch.

    Returns:
      The loss; None without validation data, or if a stop is requested during the evaluation,
      because the run then saves first.
    """
    if data.validation is None:
        return None
    train, count = config.train, config.train.eval_batches
    source = data.validation.reshaped(train.seq_len, train.global_batch)
    if source.n_sequences is not None:
        count = min(count, math.ceil(source.n_sequences / train.global_batch))
    total, weight = 0.0, 0.0
    shape = (train.global_batch, train.seq_len)
    batches = device_batches(source, 0, count, compiled.batch_sharding, *shape)
    for number, batch in enumerate(batches, start=1):
        watchdog.beat(f"evaluation, batch {number} of {count}", compiles=number == 1)
        if number == 1:
            compile_together(compiled.evaluate, params, batch)
        loss, tokens = jax.device_get(compiled.evaluate(params, batch))
        total, weight = total + float(loss), weight + float(tokens)
        if stop.asked():
            stop.cut_evaluation = True
            return None
    return total / weight


def is_evaluated(step: int, config: Config) -> bool:
    """Returns whether a run evaluates at a step: each `train.eval_every` steps and at the end."""
    train = config.train
    return step > 0 and (step == train.steps or step % train.eval_every == 0)


def is_evaluation_missing(
    state: TrainState, data: TrainingData, config: Config, meta: StepMeta
) -> bool:
    """Returns whether a stop came before the evaluation that was due at this state.

    Args:
      state: the state that a run continues with.
      data: says whether there are validation batches.
      config: sets the steps at which a run evaluates.
      meta: the description of the state; without `eval_loss`, it was not evaluated.
    """
    due = is_evaluated(int(state.step), config) and data.validation is not None
    return due and meta.eval_loss is None


def run_missed_evaluation(
    compiled: CompiledStep,
    state: TrainState,
    data: TrainingData,
    config: Config,
    instruments: "Instruments",
    recorded: float | None,
) -> None:
    """Evaluates the state that a run continues with, and adds the result to its checkpoint.

    Args:
      compiled: the step of the stage that made the state.
      state: the state, see `is_evaluation_missing`.
      data: the data of the run.
      config: the config of the stage.
      instruments: log and save the result.
      recorded: the result of this evaluation that is already in the log, or None; the same result
        is not logged twice.
    """
    i, step = instruments, int(state.step)
    with i.goodput.phase("eval"):
        weights = compiled.weights(state)
        loss = mean_validation_loss(compiled, weights, data, config, i.stop, i.watchdog)
    if loss is None:  # stopped again
        return
    if loss != recorded:
        i.log.write(step, {"eval_loss": loss, **data.train.metrics(step)})
    i.saver.add_evaluation(step, loss)


def _positions(data: TrainingData, step: int) -> list[list[int]]:
    """Returns the state of the batch source on each process; empty if the step determines it."""
    mine = list(map(int, data.train.state(step)))
    if not mine or jax.process_count() == 1:
        return [mine] if mine else []
    return multihost_utils.process_allgather(np.asarray(mine)).tolist()


@dataclasses.dataclass(frozen=True)
class Instruments:
    """The objects that the loop uses besides the device and the data."""

    saver: Checkpointer
    log: metrics.Metrics
    profiler: Profiler
    stop: StopRequest
    goodput: Goodput
    watchdog: Watchdog
    watch: Rewinder


class _Actions:
    """The actions of the loop.

    The clock of the steps stops during an action that keeps the device idle.
    """

    def __init__(
        self,
        compiled: CompiledStep,
        data: TrainingData,
        config: Config,
        instruments: Instruments,
        meta: StepMeta,
    ) -> None:
        self._compiled, self._data, self._config = compiled, data, config
        self._instruments, self._meta = instruments, meta
        self._must_compile = True

    def enter(self, stage: Stage, step: int, *, begins: bool) -> Iterator[Batch]:
        """Goes to a stage of the run; returns its batches from `step` on.

        Args:
          stage: the stage.
          step: the number of steps taken.
          begins: whether the run comes from the stage before it, which the console then says.
        """
        i, train = self._instruments, stage.config.train
        if not same_program(self._compiled.config, stage.config):
            i.log.flush()  # the steps before this one have another config
            i.log.start(step)
            i.log.enter(stage.config)
            self._compiled = step_of_stage(self._compiled, stage.config)
            self._must_compile = True
        changes = changed_fields(self._config.of_weights(step), stage.config)
        if begins and changes:
            say(f"stage   from step {step + 1} on: {listed(changes)}")
        shape = (train.global_batch, train.seq_len)
        stop = min(stage.stop, self._config.train.steps)
        return device_batches(self._data.train, step, stop, self._compiled.batch_sharding, *shape)

    @contextlib.contextmanager
    def _clock_stopped(self, state: TrainState, step: int) -> Iterator[None]:
        """Excludes the time inside the block from the speed of the steps."""
        jax.block_until_ready(state)
        self._instruments.log.start(step)
        yield
        self._instruments.log.start(step)

    def toggle_profile(self, state: TrainState, step: int) -> None:
        """Starts or stops the profile before the step after `step`."""
        self._instruments.log.flush()
        with self._clock_stopped(state, step):
            self._instruments.profiler.toggle(step + 1, state)

    def evaluate(self, state: TrainState, step: int) -> float | None:
        """Logs the steps so far and the validation loss; returns it, see `mean_validation_loss`."""
        i, data, config = self._instruments, self._data, self._config.of_weights(step)
        i.log.flush()
        with self._clock_stopped(state, step):
            weights = self._compiled.weights(state)
            with i.goodput.phase("eval"):
                loss = mean_validation_loss(
                    self._compiled, weights, data, config, i.stop, i.watchdog
                )
            if loss is not None:
                i.log.write(step, {"eval_loss": loss, **data.train.metrics(step)})
        return loss

    def save(self, state: TrainState, step: int, eval_loss: float | None) -> None:
        """Starts saving a state.

        Args:
          state: the state.
          step: the number of steps taken.
          eval_loss: validation loss of the state, in nats per token; None: not evaluated.

        Raises:
          UserError: a run could not continue from the state, or too many saves have failed.
        """
        i = self._instruments
        with self._clock_stopped(state, step):
            i.watch.before_save(state)
            positions, seen = _positions(self._data, step), dict(self._meta.seen)
            for name, epochs in self._data.train.seen(step).items():
                seen[name] = max(epochs, seen.get(name, 0.0))  # `data.start` may be before that
            now = dataclasses.replace(
                self._meta,
                step=step,
                positions=positions,
                seen=seen,
                eval_loss=eval_loss,
                rewinds=i.watch.rewinds,
            )
            i.watchdog.beat(f"saving step {step}")
            with i.goodput.phase("checkpoint"):
                i.saver.save(state.to_items(), now)
            i.goodput.save()

    def take_step(
        self, state: TrainState, batch: Batch, step: int
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Starts the step after `step`; waits for it only if it compiles, as the first one does.

        Args:
          state: the state before the step; it is donated.
          batch: the global batch.
          step: the number of steps taken.

        Returns:
          The next state and the metrics.
        """
        i, first = self._instruments, self._must_compile
        self._must_compile = False
        phase = i.goodput.phase("compile") if first else contextlib.nullcontext()
        with jax.transfer_guard("disallow"), phase:
            if first:
                compile_together(self._compiled.train, state, batch)
            programs = metrics.compiled_programs()
            state, step_metrics = self._compiled.train(state, batch)
            if first or metrics.compiled_programs() > programs:
                # The other processes compile too, and may take longer; exclude that from the speed.
                jax.block_until_ready(step_metrics)
                i.log.start(step + 1)
        return state, step_metrics

    def log(self, step: int, step_metrics: dict[str, jax.Array]) -> None:
        """Logs the previous step, and keeps this one until the next one runs."""
        i = self._instruments
        if step % self._config.train.log_every:
            i.log.push(step, None)
            return
        extra = {**self._data.train.metrics(step), "goodput": i.goodput.fraction()}
        i.log.push(step, {**step_metrics, **extra})

    def rewind(self, state: TrainState, step: int, in_row: int) -> TrainState:
        """Goes back to a checkpoint, see `Rewinder.rewind`.

        Args:
          state: the present state; it is deleted.
          step: the number of steps taken.
          in_row: the number of steps skipped in a row.

        Raises:
          UserError: no checkpoint can be used.
        """
        i = self._instruments
        i.log.flush()
        with self._clock_stopped(state, step):
            i.watchdog.beat("going back to a checkpoint", compiles=True)
            with i.goodput.phase("checkpoint"):
                return i.watch.rewind(state, in_row)


def run_loop(
    compiled: CompiledStep,
    state: TrainState,
    data: TrainingData,
    config: Config,
    instruments: Instruments,
    meta: StepMeta,
) -> TrainState:
    """Makes steps until `train.steps` or a stop request; returns the last state.

    The order is a contract:

    eval -> save -> next batch -> step -> log the previous step. Saving comes before the next batch
    is read, so that state and data position always agree. A stage of the run begins between the
    two: it may compile another step, and reads other batches. Logging reads a step while the next
    one already runs, so that the device never waits for the host. Otherwise the loop waits for the
    device only at the first step of a program, which compiles on every process. An implicit
    transfer of an array raises an error. A profile starts and stops before all of this; a rewind
    comes last, and is saved at once. The speed in the log covers only steps: the clock stops during
    everything else, and a step that compiles does not count.

    Args:
      compiled: the jitted steps, their mesh and shardings.
      state: the first state.
      data: the data of the run.
      config: the config of the run.
      instruments: watch, log and save the run.
      meta: the description of the first state.

    Raises:
      UserError: the run cannot continue, or cannot be saved.
    """
    train, i = config.train, instruments
    actions = _Actions(compiled, data, config, instruments, meta)
    start = int(state.step)
    stages = {max(s.start, start): s for s in config.stages if s.stop > start}
    batches: Iterator[Batch] = iter(())
    i.goodput.enter("step")
    i.goodput.save()  # so that the time of a run that is killed before its first save counts too
    i.log.start(start)
    i.watch.at_start(state)
    rewound = False
    for step in range(start, train.steps + 1):
        i.watchdog.beat(f"step {step + 1}", compiles=step in stages)
        if i.profiler.must_toggle(step + 1):
            actions.toggle_profile(state, step)
        last = i.stop.asked() or step == train.steps
        if step > start:
            eval_loss = None
            if is_evaluated(step, config):
                eval_loss = actions.evaluate(state, step)
                last = last or bool(i.stop.name)
            if last or rewound or step % train.checkpoint_every == 0:
                actions.save(state, step, eval_loss)
        if last:
            break
        if step in stages:
            batches = actions.enter(stages[step], step, begins=step > start)
        with i.profiler.step(step + 1):
            with i.goodput.phase("data"):
                batch = next(batches)
            state, step_metrics = actions.take_step(state, batch, step)
        actions.log(step + 1, step_metrics)
        # From the last logged step, read while the next one runs; a rewind depends only on this.
        in_row = i.watch.take_skipped_in_a_row()
        if in_row:
            state = actions.rewind(state, step + 1, in_row)
        rewound = in_row > 0
    i.log.flush()
    i.watchdog.beat("the last save")
    with i.goodput.phase("checkpoint"):
        i.saver.wait()
    i.goodput.save(at_end=True)
    return state
