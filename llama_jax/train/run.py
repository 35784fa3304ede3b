"""One run, from its config to its last state, with the text that it prints."""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Iterable, Mapping

import jax
from etils import epath

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.saved_step import CHECKPOINTS
from llama_jax.config import Config, replaced
from llama_jax.data.training_data import TrainingData, open_data
from llama_jax.data.vocabulary_size import check_ids
from llama_jax.errors import UserError
from llama_jax.files import expand, write_atomically
from llama_jax.hardware.chips import peak_flops, peak_name
from llama_jax.inference.decode import Sampling
from llama_jax.interchange.formats import Source
from llama_jax.model.cost import parameter_count
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.multihost import Peers, agreed, broadcast_text, open_collectives, say
from llama_jax.parallel.sharding import bytes_per_device
from llama_jax.train.by_hand import sample
from llama_jax.train.changes import accepted_fields
from llama_jax.train.instruments import metrics
from llama_jax.train.instruments.goodput import Goodput
from llama_jax.train.instruments.profiler import Profiler
from llama_jax.train.instruments.signals import StopRequest
from llama_jax.train.instruments.watchdog import Watchdog
from llama_jax.train.instruments.writers import AllWriters, Run, open_writers
from llama_jax.train.loop import Instruments, is_evaluation_missing, run_loop, run_missed_evaluation
from llama_jax.train.origin import Origin, find_origin, with_data_of_trunk
from llama_jax.train.overview import no_evaluation, overview, remarks, unchecked
from llama_jax.train.parts import LLAMA_PARTS, Parts
from llama_jax.train.resume import (
    check_prepared,
    check_same_config,
    check_same_data,
    check_workdir,
    locked,
)
from llama_jax.train.rewind import Rewinder
from llama_jax.train.stage_steps import check_batches, check_later_steps, step_of_stage
from llama_jax.train.start import initial_state, open_weights, with_tokenizer
from llama_jax.train.step import CompiledStep, TrainState, jit_step


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
      state: the last state.
      finished: whether all steps and the evaluation after the last step are done.
      passed_over: whether a damaged checkpoint was passed over.
      start: the step that the run began at.
      evaluated: whether a missed evaluation was repeated before the first step.
      rewinds: the rewinds that led to the state, as in `saved_step.StepMeta`.
    """

    state: TrainState
    finished: bool
    passed_over: bool
    start: int
    evaluated: bool
    rewinds: list[list[int]]


def device_memory(device: jax.Device) -> int | None:
    """Returns the memory of a device in bytes; for CPU devices, a share of the machine's memory."""
    if device.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def check_memory(
    config: Config, state: TrainState, mesh: jax.sharding.Mesh, capacity: int | None
) -> None:
    """Checks that the state and its gradients alone fit into memory, before any allocation.

    Args:
      config: the config of the run.
      state: shapes, dtypes and shardings, see `CompiledStep.placed_state`.
      mesh: the devices.
      capacity: bytes of memory of one device; None: not known, and nothing is checked.

    Raises:
      UserError: the state and its gradients need more than `capacity`.
    """
    held = (state, state.params)  # gradients have the dtypes and shardings of the parameters
    needed = bytes_per_device(held)
    if capacity is None or needed <= capacity:
        return
    leaves = jax.tree.leaves(held)
    devices = math.ceil(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / capacity)
    kind = mesh.devices.flat[0].device_kind
    raise UserError(
        f"this model has {parameter_count(config.model):,} parameters: weights, gradients and "
        f"moments need {needed / 2**30:,.0f} GiB per device on this mesh, and each of the "
        f"{mesh.size} {kind} device(s) has {capacity / 2**30:,.0f} GiB; use {devices} or more such "
        "devices with mesh.fsdp=-1, or try --config=configs/tiny.py"
    )


def _data_of_all(
    config: Config,
    workdir: epath.Path,
    given: TrainingData | None,
    seen: Mapping[str, float],
) -> TrainingData:
    """Returns the data; process 0 prepares them if needed, then the other processes open them.

    Args:
      config: the config of the run.
      workdir: the work directory.
      given: the data of this process; None: `config.data` says what to prepare or open.
      seen: see `open_data`.

    Raises:
      UserError: see `open_data`; or the processes do not have the same data.
    """
    if given is not None and given.tokenizer is not None:
        ids = given.tokenizer.vocab_size
        check_ids(ids, config, f"the tokenizer of the given data has {ids} ids")
    folder = workdir / "data"
    data = given
    if data is None and jax.process_index() == 0:
        data = open_data(config, folder, seen)
    agreed("")
    if data is None:
        check_prepared(config, folder)
        data = open_data(config, folder, seen)
    check_same_data(data.fingerprint)
    return data


def train(config: Config, workdir: epath.PathLike, data: TrainingData | None = None) -> TrainState:
    """Trains or resumes `config` in `workdir`; returns the last state.

    Args:
      config: what to train.
      workdir: folder of the run.
      data: what to train on, see `run`.

    Raises:
      UserError, Stopped: see `run`.
    """
    return run(config, workdir, data=data).state


def run(
    config: Config,
    workdir: epath.PathLike,
    began: float | None = None,
    data: TrainingData | None = None,
    parts: Parts = LLAMA_PARTS,
    accept: Iterable[str] = (),
) -> Outcome:
    """Trains or resumes `config` in `workdir`.

    Args:
      config: what to train.
      workdir: folder of the run.
      began: start time of the command, by `time.monotonic`; None: the time of this call.
      data: what to train on, on each process; `config.data` is then not used, and resuming the run
        needs the same data. None: the data that `config.data` describes.
      parts: the parts of the training, see `Parts`; resuming the run needs the same parts.
      accept: fields, such as `train.steps` or `optim`, in which the run in `workdir` may go on with
        other values; see `changes.ACCEPTABLE`.

    Returns:
      The last state, and how the run ended.

    Raises:
      UserError: the config does not fit the devices, the data, or the run in `workdir`.
      Stopped: SIGTERM or Ctrl-C came when there was nothing to save.
    """
    workdir = epath.Path(expand(os.fspath(workdir)))
    began = time.monotonic() if began is None else began
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.enter_context(Peers(stop.interrupt))
        check_same_config(config)
        accepted = accepted_fields(broadcast_text(",".join(accept)).split(","))
        if data is None:
            config = with_tokenizer(with_data_of_trunk(config, workdir), workdir)
        mesh = make_mesh(config.mesh, config.dcn)
        check_batches(config, mesh)
        stack.enter_context(jax.set_mesh(mesh))
        compiled = jit_step(replaced(config, {"train.stages": ""}), mesh, parts)
        capacity = device_memory(mesh.devices.flat[0])
        check_memory(config, compiled.placed_state(), mesh, capacity)
        goodput = Goodput(None, began)
        if jax.process_index() == 0:
            stack.enter_context(locked(workdir))
            check_workdir(config, workdir, accepted)
            goodput = Goodput(workdir / "goodput.json", began)
        with stop.at_once():
            # A list, so that `_train` can free the weights, which may hold a whole array in memory.
            agreed("")  # so that an early failure of another process is noticed before long work
            origin = find_origin(config, workdir, accepted, parts.architecture.name)
            config = origin.config
            weights = [open_weights(config, workdir, accepted)]
            agreed("")
            seen = origin.initial.seen if origin.initial is not None else {}
            data = _data_of_all(config, workdir, data, seen)
            if config.data.start == "auto" and seen:
                config = replaced(config, {"data.start": data.start})
            check_later_steps(compiled, config, origin.step)
        open_collectives()
        about = [*remarks(config, data, weights[0]), *no_evaluation(data), *unchecked(data)]
        say("\n".join([overview(config, mesh, data, parts), *about]))
        outcome = _train(compiled, config, data, workdir, stop, goodput, weights, origin)
        data.train.finish()
        compiled = step_of_stage(compiled, config.of_weights(int(outcome.state.step)))
        _report(parts, config, workdir, outcome, stop, data)
        if outcome.start < int(outcome.state.step):
            say(f"goodput      {goodput.report()}")
        if skipped := int(outcome.state.skips.total):
            say(f"skipped      {skipped} steps made no update: see metrics.jsonl")
        for at, to in outcome.rewinds:
            say(f"rewound      at step {at}, to the weights of step {to}")
        if outcome.finished:
            _print_sample(compiled, outcome.state, data)
    return outcome


def _train(
    compiled: CompiledStep,
    config: Config,
    data: TrainingData,
    workdir: epath.Path,
    stop: StopRequest,
    goodput: Goodput,
    weights: list[Source | None],
    origin: Origin,
) -> Outcome:
    """Restores or makes the first state, and trains it until the end or a stop request.

    Args:
      compiled: the step.
      config: the config of the run.
      data: the data of the run.
      workdir: the work directory.
      stop: says whether a stop is requested.
      goodput: counts the time of each phase.
      weights: a list of one item, the initial weights or None; the list is emptied.
      origin: what the run goes on from.

    Raises:
      UserError: see `run`.
    """
    device = compiled.batch_sharding.mesh.devices.flat[0]
    writers = AllWriters(list)
    if jax.process_index() == 0:
        shown = (*compiled.parts.metrics, *compiled.parts.shown)
        about = Run(config, workdir, peak_name(device), shown)
        writers = AllWriters(functools.partial(open_writers, about))
    watchdog = Watchdog(config.train.step_timeout)
    watchdog.beat("restoring", compiles=True)  # this reads all files and compiles programs
    # The writers close last: after an error, the pending save still reports events to them.
    with watchdog, writers, Checkpointer(workdir, config, writers.event) as saver:
        state, meta = initial_state(compiled, saver, data, config, weights.pop(), origin)
        watch = Rewinder(config, data, saver, meta.rewinds)
        # Not earlier: a run that is refused must not replace the files of the other run.
        if jax.process_index() == 0:
            write_atomically(workdir / "config.json", config.to_json().encode())
            if data.tokenizer is not None:
                write_atomically(workdir / "tokenizer.model", data.tokenizer.model_bytes)
        start, lost = int(state.step), is_evaluation_missing(state, data, config, meta)
        lost = lost and saver.has(start)  # the step that a branch begins with is another run's
        stage = config.of_weights(start)
        compiled = step_of_stage(compiled, stage)
        if start < config.train.steps or lost:
            writers.open()
            speed = metrics.Speed(
                stage,
                compiled.batch_sharding.mesh.size,
                peak_flops(device),
                compiled.parts.architecture.parameters,
            )
            log = metrics.Metrics(writers, speed, watch.on_read)
            window = config.train.profile_window if jax.process_index() == 0 else range(0)
            profiler = Profiler(window, workdir / "tensorboard")
            instruments = Instruments(saver, log, profiler, stop, goodput, watchdog, watch)
            try:
                if lost:
                    say(f"        step {start} has no evaluation yet: it is made now")
                    recorded = metrics.recorded_loss(workdir / "metrics.jsonl", start)
                    run_missed_evaluation(compiled, state, data, stage, instruments, recorded)
                if start < config.train.steps:
                    state = run_loop(compiled, state, data, config, instruments, meta)
            finally:
                profiler.close()
                log.flush()
    finished = int(state.step) == config.train.steps and not stop.cut_evaluation
    return Outcome(state, finished, saver.passed_over, start, lost, watch.rewinds)


def _report(
    parts: Parts,
    config: Config,
    workdir: epath.Path,
    outcome: Outcome,
    stop: StopRequest,
    data: TrainingData,
) -> None:
    """Prints how a run ended, where its files are, and how to continue."""
    if jax.process_index() != 0:
        return
    start, step = outcome.start, int(outcome.state.step)
    evaluated = outcome.evaluated
    if (start < step or evaluated) and (warning := metrics.plot_run(workdir)):
        say(warning)
    if stop.name and start == step and not evaluated:
        say("stopped before the first step; run the same command again to start")
    elif stop.name:
        say(f"stopped at step {step}, saved; run the same command again to continue")
    elif start == step:
        say(f"finished already: {workdir} is at step {step} of {config.train.steps}")
    else:
        say(f"finished at step {step}")
    say(f"checkpoints  {workdir / CHECKPOINTS}")
    say(f"loss plot    {workdir / 'plots' / 'loss.png'}")
    say(f"TensorBoard  tensorboard --logdir={workdir / 'tensorboard'}")
    # The command knows only LLaMA's architecture, and needs a tokenizer.
    if step == config.train.steps and data.tokenizer and not parts.architecture.name:
        asked = "--chat" if config.data.template else "--prompt=def"
        say(f"samples      python -m llama_jax.generate --checkpoint={workdir} {asked}")


def _print_sample(compiled: CompiledStep, state: TrainState, data: TrainingData) -> None:
    config, prompt = compiled.config, compiled.config.train.sample_prompt
    if not prompt or data.tokenizer is None or jax.process_count() > 1:
        return
    # A lower temperature than the default of `generate`, because small models drift off.
    length = min(200, config.train.seq_len // 2)
    sampling = Sampling(max_tokens=length, temperature=0.5, seed=config.train.seed)
    try:
        [text] = sample(compiled, state, [prompt], data.tokenizer, sampling)
    except UserError as error:  # must not fail a run that has finished
        say(f"no sample after {prompt!r}: {error}")
        return
    say(f"\nwhat it writes after {prompt!r}:\n{text}")
