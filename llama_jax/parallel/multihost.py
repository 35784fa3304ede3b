"""What the processes of a job tell each other outside of their devices.

They meet at JAX's coordinator, a store of keys and values in process 0. A collective of the devices
would do for texts, too, but gives up after 30 seconds on CPUs, and cannot be interrupted: nobody
learns there that another process has failed. Texts are stored as JSON: the store takes no
path that is not UTF-8.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # its coordinator has no public name; orbax does the same
from jax.experimental import multihost_utils

from llama_jax.errors import UserError, first_line, one_line

# Who is dead or hangs ends the job by other means: heartbeats, and the watchdog.
_WAIT_MS = 7 * 86_400_000
# Python handles signals between two waits of this length.
_POLL_MS = 1_000
# The listener's requests are longer, since there is one for each process all the time; a problem
# is delivered at once.
_LISTEN_MS = 10_000
# Seconds that a process has to end by itself after another one has failed.
GRACE_S = 5.0


class Stopped(KeyboardInterrupt):
    """The run was asked to stop while it had nothing to save; its message is the signal's name."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a process leaves the job.

    Attributes:
      process: its index.
      text: the error.
      signal: the name of the signal that asks to stop, where it is no error; else empty.
      over: process 0 has finished: there is no problem.
    """

    process: int
    text: str = ""
    signal: str = ""
    over: bool = False

    def error(self) -> BaseException:
        """What the other processes raise."""
        if self.signal:
            return Stopped(self.signal)
        return UserError(f"process {self.process}: {self.text}")


class Peers:
    """The processes of a job, which fail together: what ends one is raised on all.

    While this is entered, an error or a stop that leaves it on one process is published at the
    coordinator. The others raise it where they wait for each other (`agreed`, `broadcast_text`), or
    where they can be interrupted. Where they can do neither, such as in a collective in which the
    process that failed does not take part, they print it and end with status 1 after `GRACE_S`.

    With a single process this does nothing.
    """

    _runs = itertools.count(1)

    def __init__(self, interrupt: Callable[[], None] = lambda: None) -> None:
        """`interrupt` is called in a thread; it raises `Stopped` in the main thread if it may."""
        self._interrupt = interrupt
        self._place = f"llama_jax/run {next(Peers._runs)}"
        self._exchanges = itertools.count(1)
        self._oldest = 1  # of the exchanges whose keys are still there
        self._problem: Problem | None = None
        self._left = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="peers", daemon=True)

    def __enter__(self) -> "Peers":
        global _peers
        if jax.process_count() > 1:
            _peers = self
            self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        if not self._listener.is_alive() and self._problem is None:
            return
        self._left.set()
        if error is not None:
            if isinstance(error, jax.errors.JaxRuntimeError):
                # Process 0 may be gone; JAX then ends this process before the error is raised.
                traceback.print_exception(error)
            self._publish(_problem_of(error))
        elif jax.process_index() == 0:
            self._publish(Problem(0, over=True))
        self._listener.join()
        # A stop may only be how the problem of another process came here.
        if self._problem is not None and (error is None or isinstance(error, Stopped)):
            raise self._problem.error() from None

    def _publish(self, problem: Problem) -> None:
        """Tells the others, unless they know of a problem already or cannot be reached."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            text = json.dumps(dataclasses.asdict(problem))
            _client().key_value_set(f"{self._place}/problem", text)

    def _listen(self) -> None:
        """In a thread: waits for the first problem, and sees that this process ends."""
        try:
            while (text := _get(f"{self._place}/problem", _LISTEN_MS)) is None:
                pass
        except jax.errors.JaxRuntimeError:  # the coordinator is gone; JAX ends the process
            return
        problem = Problem(**json.loads(text))
        if problem.over or problem.process == jax.process_index():
            return
        self._problem = problem
        self._interrupt()
        if not problem.signal and not self._left.wait(GRACE_S):
            _end(problem)

    def check(self) -> None:
        """Raises the problem of another process, if there is one.

        Raises:
          UserError: an error of another process.
          Stopped: another process is asked to stop.
        """
        if self._problem is not None:
            raise self._problem.error()

    def exchange(self, text: str) -> dict[int, str]:
        """The texts of all processes that are not empty; as `agreed`."""
        number, me = next(self._exchanges), jax.process_index()
        place = f"{self._place}/{number}"
        if me > 0:
            _client().key_value_set(f"{place}/in/{me:06}", json.dumps(text))
            found = json.loads(self.wait_for(f"{place}/out"))
        else:
            found = {0: text, **self._gather(f"{place}/in")}
            found = {process: text for process, text in found.items() if text}
            _client().key_value_set(f"{place}/out", json.dumps(found))
            # All have come here, and need no longer what they read before.
            for older in range(self._oldest, number):
                _client().key_value_delete(f"{self._place}/{older}")
            self._oldest = number
        return {int(process): text for process, text in found.items()}

    def _gather(self, place: str) -> dict[int, str]:
        """The texts of the other processes."""
        others = {f"{place}/{process:06}": process for process in range(1, jax.process_count())}
        while True:
            found = dict(_client().key_value_dir_get(f"{place}/"))
            missing = [key for key in others if key not in found]
            if not missing:
                return {process: json.loads(found[key]) for key, process in others.items()}
            self.wait_for(missing[0])

    def share(self, text: str) -> str:
        """The text of process 0, on all."""
        key = f"{self._place}/{next(self._exchanges)}/out"
        if jax.process_index() == 0:
            _client().key_value_set(key, json.dumps(text))
            return text
        return json.loads(self.wait_for(key))

    def wait_for(self, key: str) -> str:
        """The value of a key of the coordinator, when it is there."""
        while True:
            self.check()
            value = _get(key, _POLL_MS)
            if value is not None:
                return value


_peers = Peers()  # those of whoever has entered none


def agreed(text: str) -> str:
    """The first text that is not empty, over all processes: they then all do the same about it.

    It returns when all processes have called it, each equally often; so it also keeps them
    together before a collective, which waits for less time than a file may take.

    Args:
      text: of this process.

    Raises:
      UserError, Stopped: another process has failed or is asked to stop, see `Peers`.
      JaxRuntimeError: the coordinator cannot be reached.
    """
    if jax.process_count() == 1:
        return text
    found = _peers.exchange(text)
    return found[min(found)] if found else ""


def broadcast_text(text: str) -> str:
    """The text of process 0, on all processes; all of them call it.

    Raises:
      UserError, Stopped, JaxRuntimeError: as `agreed`.
    """
    return text if jax.process_count() == 1 else _peers.share(text)


def say(text: str) -> None:
    """Prints a line, on process 0 only; an error of the stream is raised."""
    if jax.process_index() == 0:
        print(text, flush=True)


def open_collectives() -> None:
    """Makes the connections between hosts that libraries use, while all processes are here.

    Where CPUs make them, all have to come within 30 s; after that they wait for each other.
    """
    if jax.process_count() > 1:
        agreed("")
        multihost_utils.sync_global_devices("start")


def compile_together(program: Any, *arguments: Any) -> None:
    """Compiles a jitted function, and returns when all processes have.

    Run without that, one that compiles longer than the others would be waited for in a collective.
    """
    if jax.process_count() > 1:
        lower = getattr(program, "lower", None)  # stand-ins of tests have none
        if lower is not None:
            lower(*arguments).compile()
        agreed("")


def _client() -> Any:
    return distributed.global_state.client


def _get(key: str, timeout_ms: int) -> str | None:
    """The value of a key; None if it is not there in this time."""
    try:
        return _client().blocking_key_value_get(key, timeout_ms)
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith("DEADLINE_EXCEEDED"):
            return None
        raise


def _problem_of(error: BaseException) -> Problem:
    me = jax.process_index()
    if isinstance(error, Stopped):
        return Problem(me, signal=str(error))
    if isinstance(error, UserError | OSError):
        return Problem(me, one_line(str(error)))
    return Problem(me, f"{type(error).__name__}: {first_line(error)}")


def _end(problem: Problem) -> None:
    """Ends this process, whose main thread waits for what will not come.

    Should it come after all, that thread waits for this one where it leaves `Peers`.
    """
    print(f"error: {problem.error()}", file=sys.stderr, flush=True)
    # Without leaving the coordinator first, the others would print a trace; not for ever, though.
    timer = threading.Timer(GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()
    # Not `jax.distributed.shutdown`: what the main thread asks of the client would be a traceback.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().shutdown()
    os._exit(1)


class Barrier:
    """Where threads of all processes wait for each other while they do one thing in several stages.

    It takes no part of the devices, whose collectives are the main thread's, but JAX's coordinator.
    A process that has failed takes part as well and brings its problem: else the others would wait
    for it.
    """

    def __init__(self, name: str) -> None:
        """`name` is the same on all processes, and used once in a job."""
        self._name, self._stage = name, 0
        self.failed = False  # nobody comes any more

    def wait(self, problem: str = "") -> None:
        """Returns when all processes have come to this stage, each once and without a problem.

        Raises:
          OSError: the problem of the first process that has one, on all of them.
          JaxRuntimeError: they cannot meet.
        """
        self._stage += 1
        self.failed = True
        if jax.process_count() > 1:
            problem = self._share(problem)
        if problem:
            raise OSError(problem)
        self.failed = False

    def _share(self, problem: str) -> str:
        place = f"llama_jax/{self._name}/{self._stage}"
        if problem:
            mine = f"process {jax.process_index()}: {problem}"
            _client().key_value_set(f"{place}/{jax.process_index():06}", json.dumps(mine))
        _client().wait_at_barrier(place, _WAIT_MS)
        found = sorted(_client().key_value_dir_get(f"{place}/"))
        return json.loads(found[0][1]) if found else ""
