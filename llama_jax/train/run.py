"""One run, from its config to its last state, and what it says before and after."""

import contextlib
import dataclasses
import math
import os
import time

import jax
from etils import epath

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.saved_step import CHECKPOINTS
from llama_jax.config import Config
from llama_jax.data.streaming import StreamingBatches
from llama_jax.data.training_data import TrainingData, open_data
from llama_jax.errors import UserError
from llama_jax.files import expand, write_atomically
from llama_jax.hardware.chips import peak_flops, peak_name
from llama_jax.inference.decode import Sampling
from llama_jax.inference.generation import complete
from llama_jax.model.cost import adapter_count, parameter_count
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.multihost import Peers, agreed, open_collectives, say
from llama_jax.parallel.sharding import check_batch
from llama_jax.train.instruments import metrics
from llama_jax.train.instruments.goodput import Goodput
from llama_jax.train.instruments.profiler import Profiler
from llama_jax.train.instruments.signals import StopRequest
from llama_jax.train.instruments.watchdog import Watchdog
from llama_jax.train.instruments.writers import (
    ConsoleWriter,
    JsonlWriter,
    TensorBoardWriter,
    Writer,
)
from llama_jax.train.loop import Instruments, is_evaluation_missing, run_loop, run_missed_evaluation
from llama_jax.train.overview import no_evaluation, overview, remarks, unchecked
from llama_jax.train.resume import (
    check_prepared,
    check_same_config,
    check_same_data,
    check_workdir,
    locked,
)
from llama_jax.train.rewind import Rewinder
from llama_jax.train.start import initial_state, open_weights, with_tokenizer
from llama_jax.train.step import TrainState, jit_step, model_weights


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


def device_memory(device: jax.Device) -> int | None:
    """Bytes that one device can hold; for CPU devices, their share of the machine's memory."""
    if device.platform == "cpu":
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return total // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def check_memory(config: Config, mesh: jax.sharding.Mesh, capacity: int | None) -> None:
    """Checks that the state and its gradients alone fit, before anything is allocated.

    Raises:
      UserError: they need more than `capacity` bytes per device.
    """
    if capacity is None:
        return
    parameters = parameter_count(config.model)
    moment = 2 if config.optim.moment_dtype == "bfloat16" else 4
    shards = math.prod(mesh.shape[axis] for axis in ("fsdp", "context", "tensor"))
    # float32 weights, gradients and second moment; activations come on top.
    whole: float = parameters * (4 + 4 + 4 + moment)
    if config.lora.rank:
        base = {"float32": 4, "bfloat16": 2, "nf4": 0.5}[config.lora.base_dtype]
        whole = parameters * base + adapter_count(config.model, config.lora) * (12 + moment)
    needed = whole / shards
    if needed <= capacity:
        return
    kind = mesh.devices.flat[0].device_kind
    devices = math.ceil(whole / capacity)
    raise UserError(
        f"this model has {parameters:,} parameters: weights, gradients and moments need "
        f"{needed / 2**30:,.0f} GiB per device on this mesh, and each of the {mesh.size} {kind} "
        f"device(s) has {capacity / 2**30:,.0f} GiB; use {devices} or more such devices with "
        "mesh.fsdp=-1, or try --config=configs/tiny.py"
    )


def _writers(config: Config, workdir: epath.Path, device: jax.Device) -> list[Writer]:
    if jax.process_index() != 0:
        return []
    return [
        ConsoleWriter(config.train.steps, peak_name(device)),
        JsonlWriter(workdir / "metrics.jsonl"),
        TensorBoardWriter(workdir / "tensorboard"),
    ]


def _data_of_all(config: Config, workdir: epath.Path) -> TrainingData:
    """The data, which process 0 prepares if need be; the others wait, and open what it has made.

    Raises:
      UserError: as `open_data`; or the processes do not have the same data.
    """
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
            weights = open_weights(config, workdir)
            agreed("")  # what fails on another process at once is not found out after hours
            data = _data_of_all(config, workdir)
        open_collectives()
        about = [*remarks(config, data, weights), *no_evaluation(data), *unchecked(data)]
        say("\n".join([overview(config, mesh, data), *about]))
        watchdog = Watchdog(config.train.step_timeout)
        watchdog.beat("restoring", compiles=True)  # all files are read, and programs compiled
        # Outermost, since a run that ends in an error waits for its save, too.
        with watchdog, Checkpointer(workdir, config) as saver:
            state, meta = initial_state(compiled, saver, data, config, weights)
            del weights  # it may hold what it read last, a whole array
            watch = Rewinder(config, data, saver, meta.rewinds)
            # Only now: a run that is refused leaves the other one's as it was.
            if jax.process_index() == 0:
                write_atomically(workdir / "config.json", config.to_json().encode())
                if data.tokenizer is not None:
                    write_atomically(workdir / "tokenizer.model", data.tokenizer.model_bytes)
            start, lost = int(state.step), is_evaluation_missing(state, data, config, meta)
            if start < config.train.steps or lost:
                device = mesh.devices.flat[0]
                speed = metrics.Speed(config, mesh.size, peak_flops(device))
                log = metrics.Metrics(_writers(config, workdir, device), speed)
                window = config.train.profile_window if jax.process_index() == 0 else range(0)
                profiler = Profiler(window, workdir / "tensorboard")
                instruments = Instruments(saver, log, profiler, stop, goodput, watchdog, watch)
                try:
                    if lost:
                        say(f"        step {start} has no evaluation yet: it is made now")
                        recorded = metrics.recorded_loss(workdir / "metrics.jsonl", start)
                        run_missed_evaluation(compiled, state, data, config, instruments, recorded)
                    if start < config.train.steps:
                        state = run_loop(compiled, state, data, config, instruments, meta)
                finally:
                    profiler.close()
                    log.close()
        if isinstance(data.train, StreamingBatches):
            data.train.tell_skips()
        _report(config, workdir, start, int(state.step), stop, evaluated=lost)
        if start < int(state.step):
            say(f"goodput      {goodput.report()}")
        if int(state.skips.total):
            say(f"skipped      {int(state.skips.total)} steps made no update: see metrics.jsonl")
        for at, to in watch.rewinds:
            say(f"rewound      at step {at}, to the weights of step {to}")
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
        say(warning)
    if stop.name and start == step and not evaluated:
        say("stopped before the first step; run the same command again to start")
    elif stop.name:
        say(f"stopped at step {step}, saved; run the same command again to go on")
    elif start == step:
        say(f"finished already: {workdir} is at step {step} of {config.train.steps}")
    else:
        say(f"finished at step {step}")
    say(f"checkpoints  {workdir / CHECKPOINTS}")
    say(f"loss plot    {workdir / 'plots' / 'loss.png'}")
    say(f"TensorBoard  tensorboard --logdir={workdir / 'tensorboard'}")
    if step == config.train.steps:
        asked = "--chat" if config.data.template else "--prompt=def"
        say(f"samples      python -m llama_jax.generate --checkpoint={workdir} {asked}")


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
        say(f"no sample after {prompt!r}: {error}")
        return
    say(f"\nwhat it writes after {prompt!r}:\n{text[0]}")
