"""The loop around the step: batches, evaluation, saving and logging, in a fixed order."""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.saved_step import StepMeta
from llama_jax.config import Config
from llama_jax.data.loader import device_batches
from llama_jax.data.training_data import TrainingData
from llama_jax.parallel.multihost import compile_together
from llama_jax.train.instruments import metrics
from llama_jax.train.instruments.compile_counter import compiled_programs
from llama_jax.train.instruments.goodput import Goodput
from llama_jax.train.instruments.profiler import Profiler
from llama_jax.train.instruments.signals import StopRequest
from llama_jax.train.instruments.watchdog import Watchdog
from llama_jax.train.rewind import Rewinder
from llama_jax.train.step import CompiledStep, TrainState, model_weights


def mean_validation_loss(
    compiled: CompiledStep,
    params: Any,
    data: TrainingData,
    config: Config,
    stop: StopRequest,
    watchdog: Watchdog,
) -> float | None:
    """Mean validation loss per token over `eval_batches`.

    None without held-out documents, and where the run is asked to stop meanwhile: saving comes
    first then.
    """
    if data.validation is None:
        return None
    train, count = config.train, config.train.eval_batches
    if (n_sequences := data.validation.n_sequences) is not None:
        count = min(count, math.ceil(n_sequences / train.global_batch))
    total, weight = 0.0, 0.0
    shape = (train.global_batch, train.seq_len)
    batches = device_batches(data.validation, 0, count, compiled.batch_sharding, *shape)
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
    """Whether a run evaluates at this step: every `train.eval_every` steps, and at its end."""
    train = config.train
    return step > 0 and (step == train.steps or step % train.eval_every == 0)


def is_evaluation_missing(
    state: TrainState, data: TrainingData, config: Config, meta: StepMeta
) -> bool:
    """Whether the state that a run goes on with was to be evaluated, and a stop came before."""
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
    """Evaluates the state that a run goes on with, and adds the result to its checkpoint.

    Args:
      compiled, state, data, config: of the run; see `is_evaluation_missing`.
      instruments: which log and keep it.
      recorded: what the log has already of this evaluation; it is then not written twice.
    """
    i, step = instruments, int(state.step)
    with i.goodput.phase("eval"):
        weights = model_weights(state, config)
        loss = mean_validation_loss(compiled, weights, data, config, i.stop, i.watchdog)
    if loss is None:  # stopped again
        return
    if loss != recorded:
        i.log.write(step, {"eval_loss": loss, **data.train.metrics(step)})
    i.saver.add_evaluation(step, loss)


def _positions(data: TrainingData, step: int) -> list[list[int]]:
    """The state of the source of batches on each process; empty where the step alone says it."""
    mine = list(map(int, data.train.state(step)))
    if not mine or jax.process_count() == 1:
        return [mine] if mine else []
    return multihost_utils.process_allgather(np.asarray(mine)).tolist()


@dataclasses.dataclass(frozen=True)
class Instruments:
    """What the loop talks to, besides the device and the data."""

    saver: Checkpointer
    log: metrics.Metrics
    profiler: Profiler
    stop: StopRequest
    goodput: Goodput
    watchdog: Watchdog
    watch: Rewinder


def run_loop(
    compiled: CompiledStep,
    state: TrainState,
    data: TrainingData,
    config: Config,
    instruments: Instruments,
    meta: StepMeta,
) -> TrainState:
    """Steps until `train.steps` or a stop request; `meta` describes the state that it begins with.

    The order is a contract:

    eval -> save -> next batch -> step -> log the previous step. Saving comes before the batches
    move, so that state and data position always agree; logging reads a step whose successor is
    already running, so that the device never waits for the host. Nothing else in the loop waits for
    the device but the first step, which compiles on every process; and no array is moved behind its
    back: an implicit transfer is an error. A profile starts and stops before all of that; a rewind
    comes last, and is saved at once. The speed in the log is of steps alone: the clock stands still
    during all else, and a step that compiles is left out.
    """
    train = config.train
    i = instruments
    saver, log, profiler, stop, goodput = i.saver, i.log, i.profiler, i.stop, i.goodput
    watch = i.watch
    start = int(state.step)
    shape = (train.global_batch, train.seq_len)
    batches = device_batches(data.train, start, train.steps, compiled.batch_sharding, *shape)

    def pause(step: int) -> None:
        """Takes what follows, until `log.start`, out of the speed of the steps."""
        jax.block_until_ready(state)
        log.start(step)

    def save(step: int, eval_loss: float | None) -> None:
        pause(step)
        watch.before_save(state)
        positions = _positions(data, step)
        now = dataclasses.replace(
            meta, step=step, positions=positions, eval_loss=eval_loss, rewinds=watch.rewinds
        )
        i.watchdog.beat(f"saving step {step}")
        with goodput.phase("checkpoint"):
            saver.save(state.to_items(), now)
        goodput.save()
        log.start(step)

    goodput.enter("step")
    goodput.save()  # what a run that is killed before its first save has lost counts, too
    log.start(start)
    read, rewound = watch.at_start(state), False
    for step in range(start, train.steps + 1):
        i.watchdog.beat(f"step {step + 1}", compiles=step == start)
        if profiler.must_toggle(step + 1):
            read = log.flush() or read
            pause(step)
            profiler.toggle(step + 1, state)
            log.start(step)
        last = stop.asked() or step == train.steps
        if step > start:
            eval_loss = None
            if is_evaluated(step, config):
                read = log.flush() or read
                pause(step)
                weights = model_weights(state, config)
                with goodput.phase("eval"):
                    eval_loss = mean_validation_loss(
                        compiled, weights, data, config, stop, i.watchdog
                    )
                if eval_loss is not None:
                    log.write(step, {"eval_loss": eval_loss, **data.train.metrics(step)})
                log.start(step)
                last = last or bool(stop.name)
            if last or rewound or step % train.checkpoint_every == 0:
                save(step, eval_loss)
        if last:
            break
        with profiler.step(step + 1):
            with goodput.phase("data"):
                batch = next(batches)
            first = goodput.phase("compile") if step == start else contextlib.nullcontext()
            with jax.transfer_guard("disallow"), first:
                if step == start:
                    compile_together(compiled.train, state, batch)
                programs = compiled_programs()
                state, step_metrics = compiled.train(state, batch)
                if step == start or compiled_programs() > programs:
                    # The other processes compile, too, and may take longer; no speed is of that.
                    jax.block_until_ready(step_metrics)
                    log.start(step + 1)
        if (step + 1) % train.log_every == 0:
            extra = {**data.train.metrics(step + 1), "goodput": goodput.fraction()}
            read = log.push(step + 1, {**step_metrics, **extra}) or read
        else:
            read = log.push(step + 1, None) or read
        # Of each step that was logged, as soon as the next one runs: nothing else decides.
        in_row, read = watch.skipped_in_a_row(read), None
        if in_row:
            log.flush()
            pause(step + 1)
            i.watchdog.beat("going back to a checkpoint", compiles=True)
            with goodput.phase("checkpoint"):
                state = watch.rewind(state, in_row)
            log.start(step + 1)
        rewound = in_row > 0
    log.flush()
    i.watchdog.beat("the last save")
    with goodput.phase("checkpoint"):
        saver.wait()
    goodput.save(at_end=True)
    return state
