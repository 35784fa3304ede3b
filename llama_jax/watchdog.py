"""Ends a process that hangs: a peer that is gone, a device that does not answer, a dead disk."""

import faulthandler
import os
import sys
import threading
import time
from typing import Any

# Seconds after which the standard library's own watchdog, which needs no lock of Python's, ends a
# process whose interpreter hangs too.
GRACE_S = 10


class Watchdog:
    """Ends the process with status 1 and all its stacks, unless `beat` is called in time.

    JAX waits without end for a collective in which another process does not take part.
    """

    def __init__(self, timeout_s: float) -> None:
        """Watches nothing until the first `beat`; `timeout_s` of 0 never does."""
        self._timeout_s = timeout_s
        self._what = ""
        self._deadline = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        return self

    def beat(self, what: str) -> None:
        """Says that the process lives, and what it does next."""
        if not self._timeout_s:
            return
        self._what, self._deadline = what, time.monotonic() + self._timeout_s
        faulthandler.dump_traceback_later(self._timeout_s + GRACE_S, exit=True)
        if not self._thread.is_alive():
            self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(max(self._deadline - time.monotonic(), 0.05)):
            if time.monotonic() >= self._deadline:
                self._give_up()

    def _give_up(self) -> None:
        print(
            f"error: no sign of life for {self._timeout_s:g} s, in {self._what}; another process "
            "of the job may have died or hang. The stacks of this process follow. The same command "
            "goes on from the last checkpoint; if it is only slow, with a larger "
            "train.step_timeout",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback()
        os._exit(1)

    def __exit__(self, *_: Any) -> None:
        if self._timeout_s:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()
