"""Stopping a run on request: SIGTERM and Ctrl-C, on one process and on many."""

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stopped(KeyboardInterrupt):
    """The run was asked to stop while it had nothing to save; its message is the signal's name."""


class StopRequest:
    """What the first SIGTERM or Ctrl-C does while this is entered; a second one kills.

    The signal becomes a flag that the loop polls, to save before it ends. Inside `at_once`, where
    data are prepared, which can take hours and has nothing to save, it raises `Stopped` instead;
    not elsewhere, because JAX's own callbacks would take the exception.

    With several processes, which must stop at the same step, JAX itself listens for SIGTERM and
    agrees with the others on that step; Ctrl-C is passed on to it.
    """

    def __init__(self) -> None:
        self.name = ""
        self._at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        alone = jax.process_count() == 1
        for number in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Where a signal may end what is done in Python."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def at(self, step: int) -> bool:
        """Whether to stop before `step`; all processes must ask at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return bool(self.name)

    def _handle(self, number: int, _: Any) -> None:
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        if jax.process_count() > 1:
            print(f"\n{name}: all processes save after a step (again: stop at once)", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.name = name
        if self._at_once:
            raise Stopped(name)
        print(f"\n{name}: saving after this step (again: stop at once)", flush=True)

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
