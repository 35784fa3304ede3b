"""A watchdog that ends a process that hangs, for example when a peer, device or disk is dead."""

import faulthandler
import os
import sys
import threading
from typing import Any

TICK_S = 0.5


class Watchdog:
    """Ends the process with status 1 and prints all stacks, unless `beat` is called in time.

    JAX waits forever for a collective that another process does not join. The watchdog counts ticks
    of its own thread, not wall-clock time, so that suspending the process (Ctrl-Z) does not end it.
    """

    def __init__(self, timeout_s: float) -> None:
        """Begins to watch at the first `beat`; with a `timeout_s` of 0, never."""
        self._timeout_s = timeout_s
        self._sign = ("", 0.0)  # the last sign of life: current work, and seconds it may take
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        return self

    def beat(self, what: str, *, compiles: bool = False) -> None:
        """Reports that the process is alive, and restarts the time limit.

        Args:
          what: what the process does next, for the error message.
          compiles: whether it compiles next, which may take ten times as long.
        """
        self._sign = (what, self._timeout_s * (10 if compiles else 1))
        if self._timeout_s and not self._thread.is_alive():
            self._thread.start()

    def _watch(self) -> None:
        # Only this thread changes the time left; if `beat` changed it too, a beat could get lost.
        seen, left_s = None, 0.0
        while not self._ended.wait(TICK_S):
            sign = self._sign
            left_s = left_s - TICK_S if sign is seen else sign[1]
            seen = sign
            if left_s <= 0:
                self._give_up(sign[0])

    def _give_up(self, what: str) -> None:
        print(
            f"error: no sign of life in {what} for longer than {self._timeout_s:g} s (ten times "
            "that during compilation); another process of the job may have died or may hang. The "
            "stacks of this process follow. The same command continues from the last checkpoint; "
            "if the job is only slow, use a larger train.step_timeout",
            file=sys.stderr,
            flush=True,
        )
        if sys.__stderr__ is not None:  # not sys.stderr, which is not a file in a notebook
            faulthandler.dump_traceback(file=sys.__stderr__)
        os._exit(1)

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
