"""Trains a LLaMA, or resumes what is in the work directory.

Example:
  python -m llama_jax.train --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=200
"""

import contextlib
import dataclasses
import math
import os
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from jax.experimental import multihost_utils

from llama_jax import checkpoint as checkpoint_lib
from llama_jax import cli, metrics, xla_flags
from llama_jax.agreement import agreed
from llama_jax.checkpointer import Checkpointer
from llama_jax.config import Config
from llama_jax.continuation import complete
from llama_jax.data.loader import stream
from llama_jax.data.pipeline import TrainingData, open_data
from llama_jax.data.streaming import Position, StreamingBatches
from llama_jax.decode import Sampling
from llama_jax.describe import describe
from llama_jax.errors import UserError
from llama_jax.files import write_atomically
from llama_jax.fingerprint import fingerprint
from llama_jax.goodput import Goodput
from llama_jax.guards import (
    check_checkpoint,
    check_memory,
    check_workdir,
    device_memory,
    locked,
    record_changes,
)
from llama_jax.init_from import base_context, check_init, first_state, with_base, with_tokenizer
from llama_jax.mesh import make_mesh
from llama_jax.processes import start_processes
from llama_jax.profiler import Profiler
from llama_jax.sharding import check_batch
from llama_jax.signals import Stopped, StopRequest
from llama_jax.skip_watch import SkipWatch
from llama_jax.step import CompiledStep, TrainState, jit_step, model_weights
from llama_jax.watchdog import Watchdog


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX is told another place."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "llama_jax", "xla"))


def _writers(config: Config, workdir: epath.Path, device: jax.Device) -> list[metrics.Writer]:
    if jax.process_index() != 0:
        return []
    return [
        metrics.ConsoleWriter(config.train.steps, metrics.peak_name(device)),
        metrics.JsonlWriter(workdir / "metrics.jsonl"),
        metrics.TensorBoardWriter(workdir / "tensorboard"),
    ]


def _log(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def evaluate(
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
    train = config.train
    count = min(train.eval_batches, math.ceil(data.validation.n_sequences / train.global_batch))
    total, weight = 0.0, 0.0
    shape = (train.global_batch, train.seq_len)
    batches = stream(data.validation, 0, count, compiled.batch_sharding, *shape)
    for number, batch in enumerate(batches, start=1):
        watchdog.beat(f"evaluation, batch {number} of {count}", compiles=number == 1)
        loss, tokens = jax.device_get(compiled.evaluate(params, batch))
        total, weight = total + float(loss), weight + float(tokens)
        if stop.asked():
            return None
    return total / weight


def initial_state(
    compiled: CompiledStep, saver: Checkpointer, data: TrainingData, config: Config
) -> tuple[TrainState, list[list[int]], int]:
    """The newest good checkpoint of the work directory, or a fresh state.

    Returns:
      It, with `rewinds` and `base_context` of its `Meta`.

    Raises:
      UserError: the checkpoint is unreadable, or of another run or other data.
    """
    step = saver.newest_good_step()
    process = (jax.process_index(), jax.process_count())
    if step is None:
        if isinstance(data.train, StreamingBatches):
            data.train.start_at(0, Position(), *process)
        return first_state(compiled, config), [], base_context(config)
    if not (saver.folder(step) / "optimizer").exists():
        raise UserError(
            f"checkpoint {saver.folder(step)} has weights but no optimiser state (it was converted "
            "from elsewhere), and training cannot go on from it; begin another run with it by "
            f"--config.init_from=ckpt:{saver.folder(step).parent.parent}"
        )
    saved = checkpoint_lib.load_meta(saver.folder(step))
    changes = check_checkpoint(saved, saver.folder(step), config, data)
    if isinstance(data.train, StreamingBatches):
        if len(saved.positions) != process[1]:
            raise UserError(
                f"checkpoint {saver.folder(step)} has data positions of {len(saved.positions)} "
                f"process(es), and there are {process[1]}: streamed data can only go on with as "
                "many"
            )
        data.train.start_at(step, Position(*saved.positions[process[0]]), *process)
    _log(f"resume  from step {step}")
    if changed := record_changes(saver.folder(step).parent.parent, step, changes):
        _log(f"        {changed}")
    try:
        state = saver.restore(step, compiled.state_shardings.replace(frozen=None))
    except checkpoint_lib.DamagedCheckpoint as error:
        saver.mark_damaged(step, str(error))
        return initial_state(compiled, saver, data, config)
    state = with_base(state, compiled, config, saved.base, saver.folder(step))
    return state, saved.rewinds, saved.base_context


def _positions(data: TrainingData, step: int) -> list[list[int]]:
    """Where each process stands in streamed data; nothing for shards, where the step says it."""
    if not isinstance(data.train, StreamingBatches):
        return []
    mine = data.train.state(step)
    if jax.process_count() == 1:
        return [mine]
    return multihost_utils.process_allgather(np.asarray(mine)).tolist()


def _epoch_metrics(data: TrainingData, step: int) -> dict[str, float]:
    """Passes over each source, as metrics; of a stream also what the present one has skipped."""
    epochs = data.train.epochs(step)
    values = {f"epochs/{name}" if name else "epochs": value for name, value in epochs.items()}
    if isinstance(data.train, StreamingBatches):
        values["documents_skipped"] = data.train.skipped()
    return values


@dataclasses.dataclass(frozen=True)
class Instruments:
    """What the loop talks to, besides the device and the data."""

    saver: Checkpointer
    log: metrics.Metrics
    profiler: Profiler
    stop: StopRequest
    goodput: Goodput
    watchdog: Watchdog
    watch: SkipWatch


def run_loop(
    compiled: CompiledStep,
    state: TrainState,
    data: TrainingData,
    config: Config,
    instruments: Instruments,
    context: int = 0,
) -> TrainState:
    """Steps until `train.steps` or a stop request. The order is a contract:

    eval -> save -> next batch -> step -> log the previous step. Saving comes before the batches
    move, so that state and data position always agree; logging reads a step whose successor is
    already running, so that the device never waits for the host. Nothing else in the loop waits for
    the device, and no array is moved behind its back: an implicit transfer is an error. A profile
    starts and stops before all of that, off the clock; a rewind comes last, and is saved at once.
    """
    train = config.train
    i = instruments
    saver, log, profiler, stop, goodput = i.saver, i.log, i.profiler, i.stop, i.goodput
    watch = i.watch
    start = int(state.step)
    shape = (train.global_batch, train.seq_len)
    batches = stream(data.train, start, train.steps, compiled.batch_sharding, *shape)
    tokenizer_model = data.tokenizer.model_bytes if data.tokenizer else b""
    base = fingerprint(state.frozen) if config.lora.rank else {}

    def save(step: int, eval_loss: float | None) -> None:
        watch.before_save(state)
        meta = checkpoint_lib.Meta(
            config,
            step,
            data.fingerprint,
            tokenizer_model,
            _positions(data, step),
            eval_loss=eval_loss,
            rewinds=watch.rewinds,
            tokenizer_files=data.files,
            base=base,
            base_context=context,
        )
        i.watchdog.beat(f"saving step {step}")
        with goodput.phase("checkpoint"):
            saver.save(dataclasses.replace(state, frozen=None), meta)
        goodput.save()

    goodput.enter("step")
    goodput.save()  # what a run that is killed before its first save has lost counts, too
    log.start(start)
    read, rewound = watch.at_start(state), False
    for step in range(start, train.steps + 1):
        # What the first step does is waited for in the second.
        i.watchdog.beat(f"step {step + 1}", compiles=step <= start + 1)
        if profiler.turns(step + 1):
            read = log.flush() or read
            profiler.turn(step + 1, state)
            log.start(step)
        last = stop.asked() or step == train.steps
        if step > start:
            eval_loss = None
            if step == train.steps or step % train.eval_every == 0:
                read = log.flush() or read
                weights = model_weights(state, config)
                with goodput.phase("eval"):
                    eval_loss = evaluate(compiled, weights, data, config, stop, i.watchdog)
                if eval_loss is not None:
                    log.write(step, {"eval_loss": eval_loss, **_epoch_metrics(data, step)})
                log.start(step)
                last = last or bool(stop.name)
            if last or rewound or step % train.checkpoint_every == 0:
                save(step, eval_loss)
        if last:
            break
        with profiler.step(step + 1):
            with goodput.phase("data"):
                batch = next(batches)
            # The first call compiles, and returns when the step is under way.
            first = goodput.phase("compile") if step == start else contextlib.nullcontext()
            with jax.transfer_guard("disallow"), first:
                state, step_metrics = compiled.train(state, batch)
        if (step + 1) % train.log_every == 0:
            extra = {**_epoch_metrics(data, step + 1), "goodput": goodput.fraction()}
            read = log.push(step + 1, {**step_metrics, **extra}) or read
        else:
            read = log.push(step + 1, None) or read
        # Of each step that was logged, as soon as the next one runs: nothing else decides.
        in_row, read = watch.stuck(read), None
        if in_row:
            log.flush()
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


def train(config: Config, workdir: epath.PathLike) -> TrainState:
    """Trains or resumes `config` in `workdir`; returns the last state.

    Raises:
      UserError, Stopped: as `run`.
    """
    return run(config, workdir)[0]


def run(
    config: Config, workdir: epath.PathLike, began: float | None = None
) -> tuple[TrainState, bool]:
    """Trains or resumes `config` in `workdir`.

    Args:
      config: what to train.
      workdir: folder of the run.
      began: when the command did, by the monotonic clock, if before this call.

    Returns:
      The last state, and whether a damaged checkpoint was passed over.

    Raises:
      UserError: the config does not fit the devices, the data, or what is in `workdir`.
      Stopped: SIGTERM or Ctrl-C came when there was nothing to save.
    """
    workdir, config = epath.Path(workdir), with_tokenizer(config)
    began = time.monotonic() if began is None else began
    goodput = Goodput(None, began)
    mesh = make_mesh(config.mesh, config.dcn)
    check_memory(config, mesh, device_memory(mesh.devices.flat[0]))
    check_batch(config.train.global_batch, config.train.seq_len, config.train.grad_accum, mesh)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.enter_context(jax.set_mesh(mesh))
        compiled = jit_step(config, mesh)
        stopped = ""
        if jax.process_index() == 0:  # the others wait, and find what it has written
            stack.enter_context(locked(workdir))
            check_workdir(config, workdir)
            goodput = Goodput(workdir / "goodput.json", began)
            try:
                with stop.at_once():
                    check_init(config, workdir)
                    data = open_data(config, workdir / "data")
            except Stopped as signal_name:
                stopped = str(signal_name)
        if stopped := agreed(stopped):
            raise Stopped(stopped)
        if jax.process_index() > 0:
            data = open_data(config, workdir / "data")
        _log(describe(config, mesh, data))
        watchdog = Watchdog(config.train.step_timeout)
        watchdog.beat("restoring", compiles=True)  # all files are read, and programs compiled
        # Outermost, since a run that ends in an error waits for its save, too.
        with watchdog, Checkpointer(workdir, config) as saver:
            state, rewinds, context = initial_state(compiled, saver, data, config)
            watch = SkipWatch(config, data, saver, rewinds)
            # Only now: a run that is refused leaves the other one's as it was.
            if jax.process_index() == 0:
                write_atomically(workdir / "config.json", config.to_json().encode())
                if data.tokenizer is not None:
                    write_atomically(workdir / "tokenizer.model", data.tokenizer.model_bytes)
            start = int(state.step)
            if start < config.train.steps:
                device = mesh.devices.flat[0]
                speed = metrics.Speed(config, mesh.size, metrics.peak_flops(device))
                log = metrics.Metrics(_writers(config, workdir, device), speed)
                window = config.train.profile_window if jax.process_index() == 0 else range(0)
                profiler = Profiler(window, workdir / "tensorboard")
                instruments = Instruments(saver, log, profiler, stop, goodput, watchdog, watch)
                try:
                    state = run_loop(compiled, state, data, config, instruments, context)
                finally:
                    profiler.close()
                    log.close()
        if isinstance(data.train, StreamingBatches):
            data.train.tell_skips()
        _report(config, workdir, start, int(state.step), stop)
        if start < int(state.step):
            _log(f"goodput      {goodput.report()}")
        if int(state.skips.total):
            _log(f"skipped      {int(state.skips.total)} steps made no update: see metrics.jsonl")
        for at, to in watch.rewinds:
            _log(f"rewound      at step {at}, to the weights of step {to}")
        if int(state.step) == config.train.steps:
            _print_sample(config, state, data)
    return state, saver.passed_over


def _report(config: Config, workdir: epath.Path, start: int, step: int, stop: StopRequest) -> None:
    """Says how it ended, where everything is, and how to go on."""
    if jax.process_index() != 0:
        return
    if start < step:
        metrics.plot_loss(workdir / "metrics.jsonl", workdir / "plots" / "loss.png")
    if stop.name and start == step:
        _log("stopped before the first step; run the same command again to start")
    elif stop.name:
        _log(f"stopped at step {step}, saved; run the same command again to go on")
    elif start == step:
        _log(f"finished already: {workdir} is at step {step} of {config.train.steps}")
    else:
        _log(f"finished at step {step}")
    _log(f"checkpoints  {workdir / checkpoint_lib.CHECKPOINTS}")
    _log(f"loss plot    {workdir / 'plots' / 'loss.png'}")
    _log(f"TensorBoard  tensorboard --logdir={workdir / 'tensorboard'}")
    if step == config.train.steps:
        asked = "--chat" if config.data.template else "--prompt=def"
        _log(f"samples      python -m llama_jax.generate --checkpoint={workdir} {asked}")


def _print_sample(config: Config, state: TrainState, data: TrainingData) -> None:
    prompt = config.train.sample_prompt
    if not prompt or data.tokenizer is None or jax.process_count() > 1:
        return
    # Cooler than generate's default: a small model wanders.
    length = min(200, config.train.seq_len // 2)
    sampling = Sampling(max_tokens=length, temperature=0.5, seed=config.train.seed)
    context = config.train.seq_len
    weights = model_weights(state, config)
    text = complete(config.model, weights, data.tokenizer, [prompt], sampling, context=context)
    _log(f"\nwhat it writes after {prompt!r}:\n{text[0]}")


def main() -> int:
    """The command; flags are defined below."""
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; try --workdir=runs/tiny")
    began = time.monotonic()
    run_config = cli.load_config(_CONFIG)
    xla_flags.use_preset(_XLA_PRESET.value)
    means = start_processes(_START_TIMEOUT.value)
    if means:
        _log(f"start   {jax.process_count()} processes, found by {means}")
    use_compilation_cache()
    try:
        state, damaged = run(run_config, _WORKDIR.value, began)
    except Stopped as signal_name:
        _log(f"\n{signal_name}: stopped, nothing to save; run the same command again to go on")
        return _STOPPED_STATUS.value
    if int(state.step) < run_config.train.steps:
        return _STOPPED_STATUS.value
    status = _DAMAGED_STATUS.value if damaged else 0
    if status:
        _log(
            f"exit status {status}: trained to the end, but a damaged checkpoint was passed over "
            "on the way, see above; --damaged_status"
        )
    return status


if __name__ == "__main__":
    _CONFIG = cli.config_flag()
    _WORKDIR = flags.DEFINE_string(
        "workdir", None, "Folder of the run: config, checkpoints, metrics, plots; local or gs://."
    )
    _XLA_PRESET = flags.DEFINE_string(
        "xla_preset",
        "none",
        f"Compiler flags for a target: {', '.join(xla_flags.PRESETS)}. Flags of your own in "
        "XLA_FLAGS and LIBTPU_INIT_ARGS win.",
    )
    _START_TIMEOUT = flags.DEFINE_integer(
        "start_timeout", 300, "Seconds to wait for the other processes of the job.", lower_bound=1
    )
    _STOPPED_STATUS = flags.DEFINE_integer(
        "stopped_status",
        0,
        "Exit status after SIGTERM, saved but not finished; launchers that restart what fails "
        "want one that is not 0.",
        lower_bound=0,
        upper_bound=255,
    )
    _DAMAGED_STATUS = flags.DEFINE_integer(
        "damaged_status",
        74,
        "Exit status after training to the end, where a damaged checkpoint was passed over; not 0, "
        "so that somebody looks at the disk. launch/retry.sh does not restart after 74.",
        lower_bound=0,
        upper_bound=255,
    )
    cli.run(main, __doc__)
