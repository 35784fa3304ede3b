"""Where the numbers of a run are written: JSON lines, TensorBoard, the console."""

import math
import sys
import time
from typing import Any, Protocol

from etils import epath

from llama_jax.files import append_jsonl


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
        append_jsonl(path, [])

    def write(self, step: int, record: dict[str, float | None]) -> None:
        """Writes `{"step": step, ...}`; numbers that are not finite become null."""
        values = {name: _finite(value) for name, value in record.items()}
        self._unwritten.append({"step": step, **values})
        self._flush()

    def _flush(self) -> None:
        append_jsonl(self._path, self._unwritten)
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
