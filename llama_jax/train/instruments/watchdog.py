"""Ends a process that hangs: a peer that is gone, a device that does not answer, a dead disk."""

import faulthandler
import os
import sys
import threading
from typing import Any

TICK_S = 0.5


class Watchdog:
    """Ends the process with status 1 and all its stacks, unless `beat` is called in time.

    JAX waits without end for a collective in which another process does not take part. Time is
    counted in ticks of a thread of its own: a process that was stopped (Ctrl-Z) did not hang.
    """

    def __init__(self, timeout_s: float) -> None:
        """Watches nothing until the first `beat`; `timeout_s` of 0 never does."""
        self._timeout_s = timeout_s
        self._sign = ("", 0.0)  # of life: what is done, and how long it may take
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        return self

    def beat(self, what: str, *, compiles: bool = False) -> None:
        """Says that the process lives, and what it does next: compiling has ten times as long."""
        self._sign = (what, self._timeout_s * (10 if compiles else 1))
        if self._timeout_s and not self._thread.is_alive():
            self._thread.start()

    def _watch(self) -> None:
        # The time left is this thread's alone: counted down in both, a beat could be lost.
        seen, left_s = None, 0.0
        while not self._ended.wait(TICK_S):
            sign = self._sign
            left_s = left_s - TICK_S if sign is seen else sign[1]
            seen = sign
            if left_s <= 0:
                self._give_up(sign[0])

    def _give_up(self, what: str) -> None:
        print(
            f"error: no sign of life in {what} for longer than {self._timeout_s:g} s (where "
            "it compiles, ten times that); another process of the job may have died or hang. The "
            "stacks of this process follow. The same command goes on from the last checkpoint; if "
            "it is only slow, with a larger train.step_timeout",
            file=sys.stderr,
            flush=True,
        )
        if sys.__stderr__ is not None:  # sys.stderr of a notebook is no file
            faulthandler.dump_traceback(file=sys.__stderr__)
        os._exit(1)

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
