"""Writers of the numbers and events of a run: to the console, JSON lines and TensorBoard.

To add a writer, such as one for a tracker, write a class with the three methods of `Writer`, and
add a line to `WRITERS`.
"""

import contextlib
import dataclasses
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from etils import epath

from llama_jax.config import Config
from llama_jax.files import append_jsonl


class Writer(Protocol):
    """Writes the records of a run. An exception other than OSError ends the run."""

    def write(self, step: int, record: Mapping[str, float | None]) -> None:
        """Writes the numbers of one step; a number may be missing (None) or not finite."""

    def event(self, step: int, text: str, record: Mapping[str, Any]) -> None:
        """Writes an event, such as a failed save; other threads may call this.

        Args:
          step: the step that the event belongs to.
          text: one line, which the console already shows.
          record: the kind of the event as `event`, and details that JSON can represent.
        """

    def close(self) -> None:
        """Flushes and closes."""


class AllWriters:
    """A `Writer` that passes each record to all writers, from one thread at a time.

    The first record, or `open`, opens the writers, so that a run that is refused makes no files. A
    full or missing disk does not end the run.
    """

    def __init__(self, open_all: Callable[[], Iterable[Writer]]) -> None:
        """Keeps `open_all`, which makes the writers."""
        self._open_all = open_all
        self._writers: list[Writer] | None = None
        self._lock = threading.Lock()  # saves in the background report events

    def open(self) -> None:
        """Opens the writers, if they are not open.

        Raises:
          OSError: a writer cannot write to its place.
        """
        with self._lock:
            self._opened()

    def _opened(self) -> list[Writer]:
        if self._writers is None:
            self._writers = list(self._open_all())
        return self._writers

    def write(self, step: int, record: Mapping[str, float | None]) -> None:
        """Writes the numbers of one step."""
        with self._lock:
            for writer in self._opened():
                try:
                    writer.write(step, record)
                except OSError as error:  # `JsonlWriter` keeps the record and writes it later
                    with contextlib.suppress(OSError):  # printing may fail, too
                        print(f"warning: step {step} could not be logged: {error}", flush=True)

    def event(self, step: int, text: str, record: Mapping[str, Any]) -> None:
        """Writes an event; ignores an OSError, because the console already shows the event."""
        with self._lock, contextlib.suppress(OSError):
            for writer in self._opened():
                with contextlib.suppress(OSError):
                    writer.event(step, text, record)

    def close(self) -> None:
        """Closes the writers that were opened."""
        with self._lock:
            for writer in self._writers or ():
                with contextlib.suppress(OSError):
                    writer.close()

    def __enter__(self) -> "AllWriters":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class JsonlWriter:
    """Writes one JSON object per line to `metrics.jsonl`, without delay.

    A record that cannot be written is kept, and is written with the next one.
    """

    def __init__(self, path: epath.Path) -> None:
        """Opens the file for appending.

        Raises:
          OSError: the file cannot be written to.
        """
        self._path = path
        self._unwritten: list[dict[str, Any]] = []
        append_jsonl(path, [])

    def write(self, step: int, record: Mapping[str, float | None]) -> None:
        """Writes `{"step": step, ...}`; numbers that are not finite become null."""
        values = {name: _finite(value) for name, value in record.items()}
        self._unwritten.append({"step": step, **values})
        self._flush()

    def event(self, step: int, text: str, record: Mapping[str, Any]) -> None:
        """Writes `{"step": step, "event": kind, ...}`."""
        self._unwritten.append({"step": step, **record})
        self._flush()

    def _flush(self) -> None:
        append_jsonl(self._path, self._unwritten)
        self._unwritten.clear()

    def close(self) -> None:
        """Tries again to write the records that could not be written."""
        if self._unwritten:
            self._flush()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class TensorBoardWriter:
    """Writes scalars and texts for TensorBoard.

    It writes directly, without the background thread of tensorboardX: a full disk ends that thread,
    and then its full queue blocks the run forever.
    """

    def __init__(self, directory: epath.Path) -> None:
        # Imported here because it is slow to import, and only the first process needs it.
        from tensorboardX.event_file_writer import EventsWriter

        directory.mkdir(parents=True, exist_ok=True)
        self._events = EventsWriter(str(directory / "events"))

    def write(self, step: int, record: Mapping[str, float | None]) -> None:
        """Writes all numbers except None."""
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if value is not None
        ]
        self._add(step, Summary(value=values))

    def event(self, step: int, text: str, record: Mapping[str, Any]) -> None:
        """Writes the text of an event, under the name of its kind."""
        from tensorboardX.summary import text as as_text

        self._add(step, as_text(f"events/{record['event']}", text))

    def _add(self, step: int, summary: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
        self._events.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._events.close()


class ConsoleWriter:
    """Prints one line per log step: progress, loss, speed and remaining time."""

    def __init__(self, total_steps: int, peak_name: str, further: Sequence[str] = ()) -> None:
        """Prints nothing yet.

        Args:
          total_steps: number of steps of the run.
          peak_name: name of the peak performance that MFU is a fraction of.
          further: names of other metrics to print, if a record has them.
        """
        self._total = total_steps
        self._peak_name = peak_name
        self._further = tuple(further)
        self._started: tuple[int, float] | None = None

    def write(self, step: int, record: Mapping[str, float | None]) -> None:
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
        learning_rate = _finite(record["learning_rate"])  # NaN if it is not known
        parts = [
            f"step {step:>{width}}/{self._total}",
            f"loss {record['loss']:.4f}",
            "lr n/a" if learning_rate is None else f"lr {learning_rate:.2e}",
            f"grad_norm {record['grad_norm']:.2f}",
            f"{'-' if rate is None else f'{rate:,.0f}'} tokens/s",
            "MFU n/a" if mfu is None else f"MFU {mfu:.1%} of {self._peak_name}",
            f"ETA {self._eta(step, now)}",
        ]
        if record.get("skipped"):
            parts.append(f"skipped {record['skipped']:.0f}")
        for name in self._further:
            if (value := record.get(name)) is not None:
                parts.append(f"{name} {value:.4g}")
        print("  ".join(parts))
        sys.stdout.flush()

    def event(self, step: int, text: str, record: Mapping[str, Any]) -> None:
        """Prints nothing, because the code that reports an event prints its line."""

    def _eta(self, step: int, now: float) -> str:
        assert self._started is not None
        first, since = self._started
        if step == first:
            return "-"
        seconds = round((now - since) / (step - first) * (self._total - step))
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"

    def close(self) -> None:
        """Does nothing."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The run that a writer writes about.

    Attributes:
      config: its config.
      workdir: its work directory.
      peak_name: name of the peak performance that MFU is a fraction of.
      shown: names of further metrics that the console shows.
    """

    config: Config
    workdir: epath.Path
    peak_name: str
    shown: tuple[str, ...] = ()


# Functions that open the writers, by name. A tracker is one more line here.
WRITERS: dict[str, Callable[[Run], Writer]] = {
    "console": lambda run: ConsoleWriter(run.config.train.steps, run.peak_name, run.shown),
    "jsonl": lambda run: JsonlWriter(run.workdir / "metrics.jsonl"),
    "tensorboard": lambda run: TensorBoardWriter(run.workdir / "tensorboard"),
}


def open_writers(run: Run) -> list[Writer]:
    """Opens all of `WRITERS`.

    Raises:
      OSError: a writer cannot write to its place.
    """
    return [make(run) for make in WRITERS.values()]
