"""How a run is going: speed, MFU, and where the numbers are written.

`metrics.jsonl` has one JSON object per line. A logged step has `step`, `loss`, `learning_rate`,
`grad_norm` and the other metrics of `step.train_step`, `epochs`, `goodput`, and

- `tokens_per_second`, of all devices, and `mfu`: of the steps since the record before, and of
  nothing else. Saving, evaluation, going back to a checkpoint, profiling and steps that compile are
  left out. Null where no step was timed, as in the record of a first step; `mfu` also where the
  device's peak is not known.
- `chip_seconds`: all time since the record before, whatever it was spent on, times devices.

An evaluation has `step`, `eval_loss` and `epochs`; what else happens has an `event`.
"""

import contextlib
import dataclasses
import math
import sys
import time
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from llama_jax.chips import find_chip
from llama_jax.compiles import compiled_programs
from llama_jax.config import Config
from llama_jax.cost import flops_per_token
from llama_jax.errors import first_line
from llama_jax.files import append_records, number, read_records


def peak_flops(device: jax.Device) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None where it is not known (CPUs, new chips)."""
    chip = find_chip(device.device_kind)
    return None if chip is None else chip.peak_flops


def peak_name(device: jax.Device) -> str:
    """What MFU is a share of, such as `NVIDIA H200 989 TFLOP/s`."""
    peak = peak_flops(device)
    return device.device_kind + (f" {peak / 1e12:,.0f} TFLOP/s" if peak else "")


@dataclasses.dataclass
class Speed:
    """Tokens per second, model FLOPs utilisation and the time of all chips, between two readings.

    Tokens per second and MFU are of steps only. What else takes time between two readings (saving,
    evaluation, going back to a checkpoint, compiling) is cut out with `count` and `restart`. MFU is
    FLOPs of the model (6 per weight in a matrix product, plus causal attention; see
    `cost.flops_per_token`) over what all devices could do at their peak.
    """

    config: Config
    devices: int
    peak: float | None

    def __post_init__(self) -> None:
        self._steps, self._seconds = 0, 0.0  # of the steps that are counted and not yet read
        self.restart()
        self._read_at = self._since

    def restart(self, at: float | None = None) -> None:
        """Starts the clock; the time since the last `count` belongs to no step.

        Args:
          at: when, by `time.perf_counter`; None: now.
        """
        self._since = time.perf_counter() if at is None else at
        self._compiled = compiled_programs()

    def count(self, steps: int, finished: float | None = None) -> None:
        """Counts steps that took the time since the clock was started, and starts it again.

        They are left out if a program was compiled meanwhile.

        Args:
          steps: how many.
          finished: when the last of them was done, by `time.perf_counter`; None: now.
        """
        now = time.perf_counter() if finished is None else finished
        if steps > 0 and compiled_programs() == self._compiled:
            self._steps += steps
            self._seconds += now - self._since
        self.restart(now)

    def read(self, steps: int, finished: float | None = None) -> dict[str, float | None]:
        """The speed since the reading before; counts `steps` steps first, if any, see `count`.

        Returns:
          `tokens_per_second` (all devices) and `mfu`: None if no step was counted; `mfu` also if
          no peak is known. `chip_seconds`: all time since the reading before, whatever it was spent
          on, times devices.
        """
        if steps:
            self.count(steps, finished)
        now = time.perf_counter()
        chip_seconds = (now - self._read_at) * self.devices
        self._read_at = now
        rate = mfu = None
        if self._steps:
            rate = self._steps * self.config.train.tokens_per_step / max(self._seconds, 1e-9)
        self._steps, self._seconds = 0, 0.0
        if rate is not None and self.peak is not None:
            config = self.config
            flops = flops_per_token(config.model, config.lora, config.train.seq_len)
            mfu = rate * flops / (self.peak * self.devices)
        return {"tokens_per_second": rate, "mfu": mfu, "chip_seconds": chip_seconds}


class Writer(Protocol):
    """Takes one record: a step and named numbers."""

    def write(self, step: int, record: dict[str, float | None]) -> None:
        """Writes the numbers of one step."""

    def close(self) -> None:
        """Flushes and closes."""


class JsonlWriter:
    """One JSON object per line in `metrics.jsonl`, written at once.

    A record that cannot be written is kept, and written with the next one.
    """

    def __init__(self, path: epath.Path) -> None:
        """Raises `OSError` where the file cannot be written to."""
        self._path = path
        self._unwritten: list[dict[str, Any]] = []
        append_records(path, [])

    def write(self, step: int, record: dict[str, float | None]) -> None:
        """Writes `{"step": step, ...}`; numbers that are not finite become null."""
        values = {name: _finite(value) for name, value in record.items()}
        self._unwritten.append({"step": step, **values})
        self._flush()

    def _flush(self) -> None:
        append_records(self._path, self._unwritten)
        self._unwritten.clear()

    def close(self) -> None:
        """Tries once more to write what could not be written."""
        if self._unwritten:
            self._flush()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class TensorBoardWriter:
    """Scalars for TensorBoard.

    Written at once, not by tensorboardX's thread: a full disk ends that thread, and its queue then
    blocks the run for ever.
    """

    def __init__(self, directory: epath.Path) -> None:
        # Slow to import, and needed by the first process only.
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(directory / "events"))

    def write(self, step: int, record: dict[str, float | None]) -> None:
        """Writes every number that is there."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if value is not None
        ]
        event = Event(step=step, wall_time=time.time(), summary=Summary(value=values))
        self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._events.close()


class ConsoleWriter:
    """One line per log step: how far, how good, how fast, how long still."""

    def __init__(self, total_steps: int, peak_name: str) -> None:
        self._total = total_steps
        self._peak_name = peak_name
        self._started: tuple[int, float] | None = None

    def write(self, step: int, record: dict[str, float | None]) -> None:
        """Prints a step or an evaluation."""
        width = len(str(self._total))
        if "eval_loss" in record:
            epochs = [
                f"{name.removeprefix('epochs').removeprefix('/')} {value:.2f}".strip()
                for name, value in record.items()
                if name.startswith("epochs") and value is not None
            ]
            tail = f"  epochs {', '.join(epochs)}" if epochs else ""
            print(f"step {step:>{width}}  eval_loss {record['eval_loss']:.4f}{tail}")
            return
        now = time.perf_counter()
        if self._started is None:
            self._started = (step, now)
        rate, mfu = record["tokens_per_second"], record["mfu"]
        parts = [
            f"step {step:>{width}}/{self._total}",
            f"loss {record['loss']:.4f}",
            f"lr {record['learning_rate']:.2e}",
            f"grad_norm {record['grad_norm']:.2f}",
            f"{'-' if rate is None else f'{rate:,.0f}'} tokens/s",
            "MFU n/a" if mfu is None else f"MFU {mfu:.1%} of {self._peak_name}",
            f"ETA {self._eta(step, now)}",
        ]
        if record.get("skipped"):
            parts.append(f"skipped {record['skipped']:.0f}")
        print("  ".join(parts))
        sys.stdout.flush()

    def _eta(self, step: int, now: float) -> str:
        assert self._started is not None
        first, since = self._started
        if step == first:
            return "-"
        seconds = round((now - since) / (step - first) * (self._total - step))
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"

    def close(self) -> None:
        """Nothing to close."""


@dataclasses.dataclass
class _Pending:
    """What is written of a step when the next one runs.

    Attributes:
      step: its number.
      metrics: device arrays and numbers.
      finished: when the step was seen to be done, by `time.perf_counter`; None: not yet.
    """

    step: int
    metrics: dict[str, Any]
    finished: float | None


class Metrics:
    """Logs the *previous* step: reading it while the next one runs keeps the device busy."""

    def __init__(self, writers: list[Writer], speed: Speed) -> None:
        self._writers = writers
        self._speed = speed
        self._pending: _Pending | None = None
        self._counted = 0  # the last step that `Speed` has counted, or that belongs to no interval
        self._pushed = 0  # the last step that was pushed; the pending one, if there is one

    def start(self, step: int) -> None:
        """Counts the steps that were pushed, and starts the clock for those after `step`.

        It is called when the device is idle: before anything slow that is not training, and again
        after it. The time between belongs to no step, and neither does a step that was not pushed.
        """
        finished = self._pending.finished if self._pending else None
        self._speed.count(self._pushed - self._counted, finished)
        self._speed.restart()
        self._counted = self._pushed = step

    def push(self, step: int, metrics: dict[str, Any] | None) -> dict[str, float | None] | None:
        """Writes what was pushed before, then keeps `metrics` (device arrays; None: no log).

        Returns:
          What was written, if anything was.
        """
        written = self.flush()
        if metrics is not None:
            finished = time.perf_counter() if _is_finished(metrics) else None
            self._pending = _Pending(step, metrics, finished)
        self._pushed = step
        return written

    def flush(self) -> dict[str, float | None] | None:
        """Writes the pending step, waiting for the device if need be; returns what it wrote."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        read = jax.device_get(pending.metrics)
        values: dict[str, float | None] = {name: float(value) for name, value in read.items()}
        steps = max(pending.step - self._counted, 0)
        self._counted += steps
        values |= self._speed.read(steps, pending.finished)
        self.write(pending.step, values)
        return values

    def write(self, step: int, record: dict[str, float | None]) -> None:
        """Writes a record at once (evaluations); a disk that is full or gone ends no run."""
        for writer in self._writers:
            try:
                writer.write(step, record)
            except OSError as error:  # `JsonlWriter` keeps the record until it can be written
                with contextlib.suppress(OSError):  # of the console, too
                    print(f"warning: step {step} could not be logged: {error}", flush=True)

    def close(self) -> None:
        """Writes what is pending and closes the writers."""
        self.flush()
        for writer in self._writers:
            with contextlib.suppress(OSError):
                writer.close()


def _is_finished(metrics: dict[str, Any]) -> bool:
    """Whether the step that gives these numbers is done, without waiting for it.

    Backends that run a step before they return from its call have finished the previous one long
    before it is read.
    """

    def ready(value: Any) -> bool:
        is_ready = getattr(value, "is_ready", None)  # of an array on a device
        if is_ready is not None:
            return is_ready()
        return isinstance(value, float | int | np.generic | np.ndarray)

    return all(map(ready, metrics.values()))


def recorded_loss(jsonl: epath.Path, step: int) -> float | None:
    """The last `eval_loss` that a `metrics.jsonl` has of a step, if it has one."""
    found = None
    for record in read_records(jsonl)[0] if jsonl.exists() else ():
        if number(record, "step") == step and "eval_loss" in record:
            found = number(record, "eval_loss")
    return found


def plot_loss(jsonl: epath.Path, output: epath.Path) -> int:
    """Draws training and validation loss of a `metrics.jsonl` as a PNG.

    Returns:
      How many lines of the file are damaged and left out; the plot says it, too.

    Raises:
      UserError: the file cannot be read.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records, damaged = read_records(jsonl)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        # A resumed run repeats steps that were lost; the later record counts.
        pairs = ((record["step"], number(record, name)) for record in records)
        points = {step: loss for step, loss in pairs if loss is not None}
        if points:
            axes.plot(*zip(*sorted(points.items()), strict=True), style, label=label, markersize=4)
    title = f"LLaMA training ({damaged} damaged lines left out)" if damaged else "LLaMA training"
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as file:
        figure.savefig(file, format="png", bbox_inches="tight")
    pyplot.close(figure)
    return damaged


def plot_run(workdir: epath.Path) -> str:
    """Draws `plots/loss.png` of a work directory; whatever is wrong with it ends no run.

    Returns:
      A warning, if one is due; else nothing.
    """
    jsonl = workdir / "metrics.jsonl"
    try:
        damaged = plot_loss(jsonl, workdir / "plots" / "loss.png")
    except Exception as error:  # the run is saved: nothing that a plot meets may end it
        return f"warning: the loss could not be plotted: {first_line(error)}"
    if damaged:
        return f"warning: {damaged} damaged line(s) of {jsonl} are left out of the plot"
    return ""
