"""Stopping a run on request: SIGTERM and Ctrl-C, on one process and on many."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # its listener for SIGTERM has no public name
from jax.experimental import multihost_utils

from llama_jax.parallel.multihost import Stopped


class StopRequest:
    """What the first SIGTERM or Ctrl-C does while this is entered; a second one kills.

    The signal becomes a flag that the loop polls, to save before it ends. Inside `at_once`, where
    data are prepared, which can take hours and has nothing to save, it raises `Stopped` instead;
    not elsewhere, because JAX's own callbacks would take the exception.

    Several processes must stop at the same place. From the first `asked` on JAX itself listens for
    SIGTERM there, and agrees with the others on the call of `asked` that is to say so; what came
    before, and Ctrl-C, is passed on to it. A second SIGTERM kills as soon as they have agreed.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal, when all processes know of it
        self.cut_evaluation = False  # whether an evaluation has been given up because of it
        self._received = ""  # before JAX listens
        self._at_once = False
        self._interrupted = ""  # "asked" by `interrupt`, "done" by the handler
        self._calls = 0
        self._ours = [signal.SIGINT, signal.SIGTERM]
        self._previous: dict[int, Any] = {}
        # It does so already where whoever has joined the processes did not use `join_job`.
        self._jax_listens = distributed.global_state.preemption_sync_manager is not None

    def __enter__(self) -> "StopRequest":
        if self._jax_listens:
            self._ours.remove(signal.SIGTERM)
        for number in self._ours:
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

    def interrupt(self) -> None:
        """Ends what is done `at_once`, because another process has failed or is asked to stop.

        It is called in another thread. The signals that this process gets for itself come on top,
        often at the same moment, and count as if this had not been.
        """
        if self._at_once and not self._received:
            self._interrupted = "asked"
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)

    def asked(self) -> bool:
        """Whether to stop here; all processes must ask equally often, at the same places."""
        if jax.process_count() > 1 and not self.name:
            if not self._jax_listens:
                self._let_jax_listen()
            # Not the step: what is agreed on is the next number, whatever the others are at.
            self._calls += 1
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self.name = "SIGTERM"
                self._next_one_kills()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX would only take note of it
        return bool(self.name)

    def _let_jax_listen(self) -> None:
        self._ours.remove(signal.SIGTERM)  # before its handler is there: it must stay
        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()
        self._jax_listens = True
        if self._received:
            os.kill(os.getpid(), signal.SIGTERM)

    def _next_one_kills(self) -> None:
        for number in self._ours:
            signal.signal(number, signal.SIG_DFL)

    def _handle(self, number: int, _: Any) -> None:
        if self._interrupted == "asked" and number == signal.SIGINT:
            self._interrupted = "done"
            if self._at_once:
                raise Stopped(signal.Signals(number).name)
            return
        self._next_one_kills()
        if self._interrupted:
            return  # it ends already
        name = self._received = signal.Signals(number).name
        if self._at_once:
            raise Stopped(name)
        alone = jax.process_count() == 1
        who = "saving" if alone else "all processes save"
        _print(f"\n{name}: {who} after this step (again: stop at once)")
        if alone:
            self.name = name
        elif self._jax_listens:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *_: Any) -> None:
        for number in self._ours:
            signal.signal(number, self._previous[number])


def _print(text: str) -> None:
    """Prints a line from a signal handler, which may have interrupted another print."""
    try:
        print(text, flush=True)
    except RuntimeError:  # the buffer of stdout is being written to, and takes nothing else
        os.write(sys.stdout.fileno(), f"{text}\n".encode())
