"""Metrics of a run: its speed, its MFU, and a record of each logged step.

`metrics.jsonl` has one JSON object per line. The record of a logged step has `step`, `loss`,
`learning_rate`, `grad_norm` and the other metrics of `step.train_step`, `epochs`, `goodput`, and

- `tokens_per_second`, of all devices, and `mfu`: only of the steps since the previous record.
  Saving, evaluation, going back to a checkpoint, profiling and steps that compile are left out.
  Null if no step was timed, as in the record of a first step; `mfu` also if the device's peak is
  not known.
- `chip_seconds`: all time since the previous record, for any use, times the number of devices.

The record of an evaluation has `step`, `eval_loss` and `epochs`. Other events have an `event`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from llama_jax.config import Config
from llama_jax.errors import first_line
from llama_jax.files import number, read_jsonl
from llama_jax.model.cost import flops_per_step
from llama_jax.parameters import PARAMETERS, Table
from llama_jax.train.instruments.writers import Writer

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0  # programs that this process has compiled


def compiled_programs() -> int:
    """Returns the number of programs compiled, or read from the cache, since the first call."""
    _listen()
    return _count


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_duration_secs_listener(_add)


def _add(event: str, duration_secs: float, **_: str | int) -> None:
    global _count
    if event == _EVENT:
        _count += 1


@dataclasses.dataclass
class Speed:
    """Measures tokens per second, MFU and the time of all chips between two readings.

    Tokens per second and MFU (model FLOPs utilisation) are those of steps only: `count` and
    `restart` leave out other work between two readings (saving, evaluation, going back to a
    checkpoint, compiling). MFU is the FLOPs of the model (6 per weight in a matrix product, plus
    causal attention; see `cost.flops_per_token`) divided by the peak FLOPs of all devices.
    """

    config: Config
    devices: int
    peak: float | None
    rows: Table = dataclasses.field(default_factory=lambda: PARAMETERS)

    def __post_init__(self) -> None:
        self._tokens, self._flops, self._seconds = 0, 0.0, 0.0  # counted since the last reading
        self.use(self.config)
        self.restart()
        self._read_at = self._since

    def use(self, config: Config) -> None:
        """Counts the next steps by another config, that of the next stage of a run."""
        self._tokens_per_step = config.train.tokens_per_step
        self._flops_per_step = flops_per_step(config, self.rows)

    def restart(self, at: float | None = None) -> None:
        """Starts the clock; leaves out the time since the last `count`.

        Args:
          at: the starting time, by `time.perf_counter`; None: now.
        """
        self._since = time.perf_counter() if at is None else at
        self._compiled = compiled_programs()

    def count(self, steps: int, finished: float | None = None) -> None:
        """Counts the steps that ran since the clock was started, and starts it again.

        The steps are left out if a program was compiled in this time.

        Args:
          steps: number of steps.
          finished: time at which the last step was done, by `time.perf_counter`; None: now.
        """
        now = time.perf_counter() if finished is None else finished
        if steps > 0 and compiled_programs() == self._compiled:
            self._tokens += steps * self._tokens_per_step
            self._flops += steps * self._flops_per_step
            self._seconds += now - self._since
        self.restart(now)

    def read(self, steps: int, finished: float | None = None) -> dict[str, float | None]:
        """Returns the speed since the previous reading.

        Args:
          steps: number of steps to count first, see `count`; may be 0.
          finished: see `count`.

        Returns:
          `tokens_per_second` (all devices) and `mfu`: None if no step was counted; `mfu` also if
          no peak is known. `chip_seconds`: all time since the previous reading, for any use, times
          the number of devices.
        """
        if steps:
            self.count(steps, finished)
        now = time.perf_counter()
        chip_seconds = (now - self._read_at) * self.devices
        self._read_at = now
        rate = mfu = None
        if self._tokens:
            seconds = max(self._seconds, 1e-9)
            rate = self._tokens / seconds
            if self.peak is not None:
                mfu = self._flops / seconds / (self.peak * self.devices)
        self._tokens, self._flops, self._seconds = 0, 0.0, 0.0
        return {"tokens_per_second": rate, "mfu": mfu, "chip_seconds": chip_seconds}


@dataclasses.dataclass
class _Pending:
    """The metrics of a step that are written while the next step runs.

    Attributes:
      step: number of the step.
      metrics: device arrays and numbers.
      finished: time at which the step was known to be done, by `time.perf_counter`; None: not yet.
    """

    step: int
    metrics: dict[str, Any]
    finished: float | None


class Metrics:
    """Logs the *previous* step: its metrics are read while the device runs the next step."""

    def __init__(
        self,
        writer: Writer,
        speed: Speed,
        on_read: Callable[[Mapping[str, float | None]], None] = lambda values: None,
    ) -> None:
        """Begins with no pending step.

        Args:
          writer: writes the records.
          speed: measures the steps.
          on_read: called with the metrics of each logged step, as soon as they are read.
        """
        self._writer, self._speed, self._on_read = writer, speed, on_read
        self._pending: _Pending | None = None
        self._counted = 0  # the last step that `Speed` has counted or that is left out
        self._pushed = 0  # the last step that was pushed: the pending one, if any

    def start(self, step: int) -> None:
        """Counts the steps that were pushed, and starts the clock for those after `step`.

        Call it when the device is idle, before and after slow work that is not training. The time
        between the two calls is left out, and so are steps that were not pushed.
        """
        finished = self._pending.finished if self._pending else None
        self._speed.count(self._pushed - self._counted, finished)
        self._speed.restart()
        self._counted = self._pushed = step

    def push(self, step: int, metrics: dict[str, Any] | None) -> None:
        """Writes the pending step, and keeps `metrics` (device arrays; None: do not log `step`)."""
        self.flush()
        if metrics is not None:
            finished = time.perf_counter() if _is_finished(metrics) else None
            self._pending = _Pending(step, metrics, finished)
        self._pushed = step

    def flush(self) -> None:
        """Writes the pending step; waits for the device if the step is not done."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        read = jax.device_get(pending.metrics)
        values: dict[str, float | None] = {name: float(value) for name, value in read.items()}
        steps = max(pending.step - self._counted, 0)
        self._counted += steps
        values |= self._speed.read(steps, pending.finished)
        self.write(pending.step, values)
        self._on_read(values)

    def enter(self, config: Config) -> None:
        """Measures the next steps by the config of the next stage; call it after `start`."""
        self._speed.use(config)

    def write(self, step: int, record: dict[str, float | None]) -> None:
        """Writes a record without delay, such as that of an evaluation."""
        self._writer.write(step, record)


def _is_finished(metrics: dict[str, Any]) -> bool:
    """Returns whether the step that computes these metrics is done, without waiting for it.

    On backends whose call of a step returns only when the step is done, the previous step was done
    long before its metrics are read.
    """

    def ready(value: Any) -> bool:
        is_ready = getattr(value, "is_ready", None)  # arrays on a device have it
        if is_ready is not None:
            return is_ready()
        return isinstance(value, float | int | np.generic | np.ndarray)

    return all(map(ready, metrics.values()))


def recorded_loss(jsonl: epath.Path, step: int) -> float | None:
    """Returns the last `eval_loss` of a step in a `metrics.jsonl`, or None."""
    found = None
    for record in read_jsonl(jsonl)[0] if jsonl.exists() else ():
        if number(record, "step") == step and "eval_loss" in record:
            found = number(record, "eval_loss")
    return found


def plot_loss(jsonl: epath.Path, output: epath.Path) -> int:
    """Draws the losses and the learning rate of a `metrics.jsonl` as a PNG.

    Returns:
      The number of damaged lines, which are left out; the title of the plot shows it as well.

    Raises:
      UserError: the file cannot be read.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records, damaged = read_jsonl(jsonl)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        if points := _points(records, name):
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    if rates := _points(records, "learning_rate"):
        _draw_rates(axes, rates)
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


def _points(records: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Returns the steps that have a value of this name, each with its value, in order."""
    # A resumed run repeats the steps after its checkpoint; the later record counts.
    pairs = ((record["step"], number(record, name)) for record in records)
    return sorted({step: value for step, value in pairs if value is not None}.items())


def _draw_rates(axes: Any, rates: list[tuple[int, float]]) -> None:
    """Draws the learning rate as a thin line behind the losses, with an axis on the right."""
    right = axes.twinx()
    right.plot(*zip(*rates, strict=True), "-", label="learning rate", color="gray", linewidth=0.8)
    right.set_ylim(bottom=0)
    right.set_ylabel("learning rate", color="gray")
    right.tick_params(axis="y", colors="gray")
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)  # before matplotlib 3.11 it hides the line


def plot_run(workdir: epath.Path) -> str:
    """Draws `plots/loss.png` of a work directory; an error does not end the run.

    Returns:
      A warning; '' if all is well.
    """
    jsonl = workdir / "metrics.jsonl"
    try:
        damaged = plot_loss(jsonl, workdir / "plots" / "loss.png")
    except Exception as error:  # the run is saved, and no error of a plot may end it
        return f"warning: the loss could not be plotted: {first_line(error)}"
    if damaged:
        return f"warning: {damaged} damaged line(s) of {jsonl} are left out of the plot"
    return ""
