"""Stopping a run on request: SIGTERM and Ctrl-C, on one process and on many."""

import signal
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a flag that the loop polls; a second one kills.

    With several processes, which must stop at the same step, JAX itself listens for SIGTERM and
    agrees with the others on that step.
    """

    def __init__(self) -> None:
        self.name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def at(self, step: int) -> bool:
        """Whether to stop before `step`; all processes must ask at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return bool(self.name)

    def _handle(self, number: int, _: Any) -> None:
        self.name = signal.Signals(number).name
        print(f"\n{self.name}: saving after this step (again: stop at once)", flush=True)
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
