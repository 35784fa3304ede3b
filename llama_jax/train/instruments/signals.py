"""Requests to stop a run: SIGTERM and Ctrl-C, with one process or several."""

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
    """A context manager that handles SIGTERM and Ctrl-C; a second signal kills the process.

    The first signal sets a flag that the loop polls, so that it saves before it ends. Inside
    `at_once`, the signal raises `Stopped` instead: preparing data can take hours and has nothing to
    save. Elsewhere it raises nothing, because JAX's own callbacks might catch the exception.

    Several processes must stop at the same place. From the first call of `asked` on, JAX itself
    listens for SIGTERM, and the processes agree on the call of `asked` that returns True. An
    earlier signal, and Ctrl-C, is passed on to JAX. After the agreement a second SIGTERM kills.
    """

    def __init__(self) -> None:
        self.name = ""  # name of the signal, as soon as all processes know of it
        self.cut_evaluation = False  # whether the signal cut an evaluation short
        self._received = ""  # name of the signal that this process received
        self._at_once = False
        self._interrupted = ""  # `interrupt` sets it to "asked", and the handler to "done"
        self._calls = 0
        self._ours = [signal.SIGINT, signal.SIGTERM]
        self._previous: dict[int, Any] = {}
        # True if the processes were joined by other means than `join_job`.
        self._jax_listens = distributed.global_state.preemption_sync_manager is not None

    def __enter__(self) -> "StopRequest":
        if self._jax_listens:
            self._ours.remove(signal.SIGTERM)
        for number in self._ours:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Lets a signal raise `Stopped` in the `with` block."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def interrupt(self) -> None:
        """Ends an `at_once` block, because another process has failed or was asked to stop.

        Call it in another thread. Signals that this process receives itself, often at the same
        moment, count as if this method had not been called.
        """
        if self._at_once and not self._received:
            self._interrupted = "asked"
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)

    def asked(self) -> bool:
        """Returns whether to stop here; all processes must call it at the same places."""
        if jax.process_count() > 1 and not self.name:
            if not self._jax_listens:
                self._let_jax_listen()
            # The number of the call, not the step: the processes agree on the next number.
            self._calls += 1
            if multihost_utils.reached_preemption_sync_point(self._calls):
                self.name = "SIGTERM"
                self._next_one_kills()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX would only record the signal
        return bool(self.name)

    def _let_jax_listen(self) -> None:
        # Before JAX installs its handler, so that no code of ours replaces that handler.
        self._ours.remove(signal.SIGTERM)
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
            return  # the block already ends
        name = self._received = signal.Signals(number).name
        if self._at_once:
            raise Stopped(name)
        alone = jax.process_count() == 1
        who = "saving" if alone else "all processes save"
        _print(f"\n{name}: {who} after this step (a second signal stops at once)")
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
    except RuntimeError:  # the interrupted print is still writing to the buffer of stdout
        os.write(sys.stdout.fileno(), f"{text}\n".encode())
