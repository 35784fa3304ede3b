"""Trains a LLaMA, or resumes what is in the work directory.

Example:
  python -m llama_jax.train --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=200
"""

import contextlib
import dataclasses
import os
import time

import jax
from absl import flags
from etils import epath

from llama_jax import cli, metrics, xla_flags
from llama_jax.agreement import Peers, Stopped, agreed, open_collectives
from llama_jax.checkpoint import CHECKPOINTS, DamagedCheckpoint, Meta, load_meta
from llama_jax.checkpointer import Checkpointer
from llama_jax.chips import peak_flops, peak_name
from llama_jax.config import Config
from llama_jax.continuation import complete
from llama_jax.data.pipeline import TrainingData, open_data
from llama_jax.data.streaming import Position, StreamingBatches
from llama_jax.decode import Sampling
from llama_jax.describe import describe, no_evaluation, remarks, unchecked
from llama_jax.errors import UserError
from llama_jax.files import expand, write_atomically
from llama_jax.fingerprint import fingerprint
from llama_jax.goodput import Goodput
from llama_jax.guards import (
    check_checkpoint,
    check_memory,
    check_prepared,
    check_same_config,
    check_same_data,
    check_workdir,
    device_memory,
    locked,
    record_changes,
)
from llama_jax.init_from import check_init, first_state, with_base, with_tokenizer
from llama_jax.interchange.opening import base_context
from llama_jax.loop import Instruments, lost_evaluation, make_up, run_loop
from llama_jax.mesh import make_mesh
from llama_jax.metric_writers import ConsoleWriter, JsonlWriter, TensorBoardWriter, Writer
from llama_jax.processes import start_processes
from llama_jax.profiler import Profiler
from llama_jax.sharding import check_batch
from llama_jax.signals import StopRequest
from llama_jax.skip_watch import SkipWatch
from llama_jax.step import CompiledStep, TrainState, jit_step, model_weights
from llama_jax.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
      state: the last one.
      finished: whether all steps are done, and the evaluation after the last of them.
      passed_over: whether a damaged checkpoint was passed over.
    """

    state: TrainState
    finished: bool
    passed_over: bool


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX is told another place."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "llama_jax", "xla"))


def _writers(config: Config, workdir: epath.Path, device: jax.Device) -> list[Writer]:
    if jax.process_index() != 0:
        return []
    return [
        ConsoleWriter(config.train.steps, peak_name(device)),
        JsonlWriter(workdir / "metrics.jsonl"),
        TensorBoardWriter(workdir / "tensorboard"),
    ]


def _log(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _meta(config: Config, data: TrainingData, base: dict[str, int], context: int) -> Meta:
    """What a fresh state would say about itself."""
    return Meta(
        config,
        step=0,
        data_fingerprint=data.fingerprint,
        tokenizer_model=data.tokenizer.model_bytes if data.tokenizer else b"",
        tokenizer_files=data.files,
        base=base,
        base_context=context,
    )


def initial_state(
    compiled: CompiledStep, saver: Checkpointer, data: TrainingData, config: Config
) -> tuple[TrainState, Meta]:
    """The newest good checkpoint of the work directory, or a fresh state.

    Returns:
      It, and what a checkpoint of it would say about itself.

    Raises:
      UserError: the checkpoint is unreadable, or of another run or other data.
    """
    step = saver.newest_good_step()
    process = (jax.process_index(), jax.process_count())
    if step is None:
        if isinstance(data.train, StreamingBatches):
            data.train.start_at(0, Position(), *process)
        state = first_state(compiled, config)
        agreed("")  # one may read for longer than another waits in a collective
        base = fingerprint(state.frozen) if config.lora.rank else {}
        return state, _meta(config, data, base, base_context(config))
    if not (saver.folder(step) / "optimizer").exists():
        raise UserError(
            f"checkpoint {saver.folder(step)} has weights but no optimiser state (it was converted "
            "from elsewhere), and training cannot go on from it; begin another run with it by "
            f"--config.init_from=ckpt:{saver.folder(step).parent.parent}"
        )
    saved = load_meta(saver.folder(step))
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
    except DamagedCheckpoint as error:
        saver.mark_damaged(step, str(error))
        return initial_state(compiled, saver, data, config)
    state = with_base(state, compiled, config, saved.base, saver.folder(step))
    meta = _meta(config, data, saved.base, saved.base_context)
    loss = saved.eval_loss
    return state, dataclasses.replace(meta, step=step, rewinds=saved.rewinds, eval_loss=loss)


def _data_of_all(config: Config, workdir: epath.Path) -> TrainingData:
    """The data, which process 0 prepares if need be; the others wait, and open what it has made.

    Raises:
      UserError: as `check_init` and `open_data`; or the processes do not have the same data.
    """
    check_init(config, workdir)
    agreed("")  # what fails on another process at once is not found out after hours
    folder = workdir / "data"
    first = jax.process_index() == 0
    data = open_data(config, folder) if first else None
    agreed("")
    if data is None:
        check_prepared(config, folder)
        data = open_data(config, folder)
    check_same_data(data.fingerprint)
    return data


def train(config: Config, workdir: epath.PathLike) -> TrainState:
    """Trains or resumes `config` in `workdir`; returns the last state.

    Raises:
      UserError, Stopped: as `run`.
    """
    return run(config, workdir).state


def run(config: Config, workdir: epath.PathLike, began: float | None = None) -> Outcome:
    """Trains or resumes `config` in `workdir`.

    Args:
      config: what to train.
      workdir: folder of the run.
      began: when the command did, by the monotonic clock, if before this call.

    Raises:
      UserError: the config does not fit the devices, the data, or what is in `workdir`.
      Stopped: SIGTERM or Ctrl-C came when there was nothing to save.
    """
    workdir = epath.Path(expand(os.fspath(workdir)))
    began = time.monotonic() if began is None else began
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.enter_context(Peers(stop.interrupt))
        check_same_config(config)
        config = with_tokenizer(config, workdir)
        mesh = make_mesh(config.mesh, config.dcn)
        check_memory(config, mesh, device_memory(mesh.devices.flat[0]))
        check_batch(config.train.global_batch, config.train.seq_len, config.train.grad_accum, mesh)
        stack.enter_context(jax.set_mesh(mesh))
        compiled = jit_step(config, mesh)
        goodput = Goodput(None, began)
        if jax.process_index() == 0:
            stack.enter_context(locked(workdir))
            check_workdir(config, workdir)
            goodput = Goodput(workdir / "goodput.json", began)
        with stop.at_once():
            data = _data_of_all(config, workdir)
        open_collectives()
        about = [*remarks(config, data), *no_evaluation(data), *unchecked(data)]
        _log("\n".join([describe(config, mesh, data), *about]))
        watchdog = Watchdog(config.train.step_timeout)
        watchdog.beat("restoring", compiles=True)  # all files are read, and programs compiled
        # Outermost, since a run that ends in an error waits for its save, too.
        with watchdog, Checkpointer(workdir, config) as saver:
            state, meta = initial_state(compiled, saver, data, config)
            watch = SkipWatch(config, data, saver, meta.rewinds)
            # Only now: a run that is refused leaves the other one's as it was.
            if jax.process_index() == 0:
                write_atomically(workdir / "config.json", config.to_json().encode())
                if data.tokenizer is not None:
                    write_atomically(workdir / "tokenizer.model", data.tokenizer.model_bytes)
            start, lost = int(state.step), lost_evaluation(state, data, config, meta)
            if start < config.train.steps or lost:
                device = mesh.devices.flat[0]
                speed = metrics.Speed(config, mesh.size, peak_flops(device))
                log = metrics.Metrics(_writers(config, workdir, device), speed)
                window = config.train.profile_window if jax.process_index() == 0 else range(0)
                profiler = Profiler(window, workdir / "tensorboard")
                instruments = Instruments(saver, log, profiler, stop, goodput, watchdog, watch)
                try:
                    if lost:
                        _log(f"        step {start} has no evaluation yet: it is made now")
                        recorded = metrics.recorded_loss(workdir / "metrics.jsonl", start)
                        make_up(compiled, state, data, config, instruments, recorded)
                    if start < config.train.steps:
                        state = run_loop(compiled, state, data, config, instruments, meta)
                finally:
                    profiler.close()
                    log.close()
        if isinstance(data.train, StreamingBatches):
            data.train.tell_skips()
        _report(config, workdir, start, int(state.step), stop, evaluated=lost)
        if start < int(state.step):
            _log(f"goodput      {goodput.report()}")
        if int(state.skips.total):
            _log(f"skipped      {int(state.skips.total)} steps made no update: see metrics.jsonl")
        for at, to in watch.rewinds:
            _log(f"rewound      at step {at}, to the weights of step {to}")
        finished = int(state.step) == config.train.steps and not stop.cut_evaluation
        if finished:
            _print_sample(config, state, data)
    return Outcome(state, finished, saver.passed_over)


def _report(
    config: Config,
    workdir: epath.Path,
    start: int,
    step: int,
    stop: StopRequest,
    evaluated: bool = False,
) -> None:
    """Says how it ended, where everything is, and how to go on."""
    if jax.process_index() != 0:
        return
    if (start < step or evaluated) and (warning := metrics.plot_run(workdir)):
        _log(warning)
    if stop.name and start == step and not evaluated:
        _log("stopped before the first step; run the same command again to start")
    elif stop.name:
        _log(f"stopped at step {step}, saved; run the same command again to go on")
    elif start == step:
        _log(f"finished already: {workdir} is at step {step} of {config.train.steps}")
    else:
        _log(f"finished at step {step}")
    _log(f"checkpoints  {workdir / CHECKPOINTS}")
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
    try:
        text = complete(config.model, weights, data.tokenizer, [prompt], sampling, context=context)
    except UserError as error:  # the run has finished all the same
        _log(f"no sample after {prompt!r}: {error}")
        return
    _log(f"\nwhat it writes after {prompt!r}:\n{text[0]}")


def main() -> int:
    """The command; flags are defined below."""
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; try --workdir=runs/tiny")
    began = time.monotonic()
    run_config = cli.load_config(_CONFIG)
    chosen = xla_flags.use_preset(_XLA_PRESET.value)
    means = start_processes(_START_TIMEOUT.value)
    if means:
        _log(f"start   {jax.process_count()} processes, found by {means}")
    if chosen.tpu:
        _log(f"flags   {chosen}")
    use_compilation_cache()
    try:
        outcome = run(run_config, _WORKDIR.value, began)
    except Stopped as signal_name:
        _log(f"\n{signal_name}: stopped, nothing to save; run the same command again to go on")
        return _STOPPED_STATUS.value
    if not outcome.finished:
        return _STOPPED_STATUS.value
    status = _DAMAGED_STATUS.value if outcome.passed_over else 0
    if status:
        _log(
            f"exit status {status}: trained to the end, but a damaged checkpoint was passed over "
            "on the way, see above; --damaged_status"
        )
    return status


if __name__ == "__main__":
    _CONFIG = cli.config_flag()
    _WORKDIR = cli.path_flag(
        "workdir", None, "Folder of the run: config, checkpoints, metrics, plots; local or gs://."
    )
    _XLA_PRESET = flags.DEFINE_string("xla_preset", xla_flags.AUTO, xla_flags.HELP)
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
