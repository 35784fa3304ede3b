"""Reports what happens to checkpoints: on the console, and to a callback that records it."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

# Called with the step, the printed line, and a record: `event` is its kind, the rest are details.
OnEvent = Callable[[int, str, dict[str, Any]], None]


class Events:
    """Reports events from the main thread and from the thread of a background save."""

    def __init__(self, on_event: OnEvent | None = None) -> None:
        """Sets `on_event`, which is called on process 0, in either thread; it must not raise."""
        self._on_event = on_event

    def say(self, text: str) -> None:
        """Prints a line on process 0 only; see `say_on_all`."""
        if jax.process_index() == 0:
            self.say_on_all(text)

    @staticmethod
    def say_on_all(text: str) -> None:
        """Prints a line on every process that calls this.

        The line is written in one piece, because the loop may print at the same time. Errors are
        ignored: a full disk under stdout must not fail the save.
        """
        with contextlib.suppress(OSError):
            print(f"{text}\n", end="", flush=True)

    def report(self, step: int, text: str, *, on_all: bool = False, **record: Any) -> None:
        """Prints a line, and passes it with its record to `on_event`.

        Args:
          step: the step that the event belongs to.
          text: the line.
          on_all: whether every process prints the line, or only process 0.
          **record: `event` (its kind) and the details.
        """
        (self.say_on_all if on_all else self.say)(text)
        if self._on_event is not None and jax.process_index() == 0:
            self._on_event(step, text, record)
