"""What happens to checkpoints: said on the console, and added to metrics.jsonl."""

import contextlib
from typing import Any

import jax
from etils import epath

from llama_jax.files import append_jsonl


class Events:
    """Tells of a run's checkpoints, from the main thread and from saves in the background."""

    def __init__(self, workdir: epath.Path) -> None:
        self._records = workdir / "metrics.jsonl"

    def say(self, text: str) -> None:
        """Prints a line, on process 0 only, if that can be: the disk may be full under it, too."""
        if jax.process_index() == 0:
            self.say_on_all(text)

    @staticmethod
    def say_on_all(text: str) -> None:
        """Prints in one piece, since the loop does, too; a full disk under stdout ends no save."""
        with contextlib.suppress(OSError):
            print(f"{text}\n", end="", flush=True)

    def record(self, step: int, **record: Any) -> None:
        """Adds a line to metrics.jsonl, if that can be."""
        if jax.process_index() > 0:
            return
        # The console has it too; a full disk is likely what it is about.
        with contextlib.suppress(OSError):
            append_jsonl(self._records, [{"step": step, **record}])
