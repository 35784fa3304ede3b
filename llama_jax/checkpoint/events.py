"""Reports what happens to checkpoints: on the console, and to whoever keeps records of the run."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

# Takes the step, the line that was printed, and a record: `event` is its kind, the rest is details.
OnEvent = Callable[[int, str, dict[str, Any]], None]


class Events:
    """Reports from the main thread and from saves in the background."""

    def __init__(self, on_event: OnEvent | None = None) -> None:
        """`on_event` is called in either thread, on process 0; it must not raise."""
        self._on_event = on_event

    def say(self, text: str) -> None:
        """Prints a line, on process 0 only, if that can be: the disk may be full under it, too."""
        if jax.process_index() == 0:
            self.say_on_all(text)

    @staticmethod
    def say_on_all(text: str) -> None:
        """Prints in one piece, since the loop does, too; a full disk under stdout ends no save."""
        with contextlib.suppress(OSError):
            print(f"{text}\n", end="", flush=True)

    def report(self, step: int, text: str, *, on_all: bool = False, **record: Any) -> None:
        """Prints a line and hands it on with its record.

        Args:
          step: which the event belongs to.
          text: the line.
          on_all: whether each process prints its own.
          **record: `event`, and what else there is to know.
        """
        (self.say_on_all if on_all else self.say)(text)
        if self._on_event is not None and jax.process_index() == 0:
            self._on_event(step, text, record)
