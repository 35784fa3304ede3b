"""Messages between the processes of a job that do not need the devices.

They go through JAX's coordinator, a key-value store in process 0. A device collective could also
carry texts, but it gives up after 30 seconds on CPUs, and cannot be interrupted when another
process has failed. Texts are stored as JSON, because the store refuses paths that are not UTF-8.
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

# In effect no timeout: heartbeats and the watchdog end a job with dead or hung processes.
_WAIT_MS = 7 * 86_400_000
# Waits are this short because Python handles signals only between them.
_POLL_MS = 1_000
# The listener waits longer, because each process has one request open all the time; a problem
# still arrives at once.
_LISTEN_MS = 10_000
# Seconds in which a process must end by itself after another one has failed.
GRACE_S = 5.0


class Stopped(KeyboardInterrupt):
    """Raised when a signal stops a run that has nothing to save; the message names the signal."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The reason why a process leaves the job.

    Attributes:
      process: index of the process.
      text: the error message.
      signal: name of the signal that asks the run to stop; empty for an error.
      over: True if process 0 has finished, which is not a problem.
    """

    process: int
    text: str = ""
    signal: str = ""
    over: bool = False

    def error(self) -> BaseException:
        """Returns the exception that the other processes raise."""
        if self.signal:
            return Stopped(self.signal)
        return UserError(f"process {self.process}: {self.text}")


class Peers:
    """A context in which the processes of a job fail together.

    An error or a stop that leaves the context on one process is published at the coordinator. The
    other processes raise it where they wait for each other (`agreed`, `broadcast_text`), or where
    they can be interrupted. A process that can do neither, for example because it waits in a
    collective for the failed process, prints the error and ends with status 1 after `GRACE_S`.

    With a single process the context does nothing.
    """

    _runs = itertools.count(1)

    def __init__(self, interrupt: Callable[[], None] = lambda: None) -> None:
        """Stores `interrupt`; a thread calls it to raise `Stopped` in the main thread if it can."""
        self._interrupt = interrupt
        self._place = f"llama_jax/run {next(Peers._runs)}"
        self._exchanges = itertools.count(1)
        self._oldest = 1  # number of the oldest exchange whose keys still exist
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
        # `Stopped` may only be the form in which the problem of another process was raised here.
        if self._problem is not None and (error is None or isinstance(error, Stopped)):
            raise self._problem.error() from None

    def _publish(self, problem: Problem) -> None:
        """Publishes a problem, unless one is published already or the coordinator is lost."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            text = json.dumps(dataclasses.asdict(problem))
            _client().key_value_set(f"{self._place}/problem", text)

    def _listen(self) -> None:
        """Waits in a thread for the first problem, and then makes this process end."""
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
        """Exchanges texts; returns those that are not empty, by process. See `agreed`."""
        number, me = next(self._exchanges), jax.process_index()
        place = f"{self._place}/{number}"
        if me > 0:
            _client().key_value_set(f"{place}/in/{me:06}", json.dumps(text))
            found = json.loads(self.wait_for(f"{place}/out"))
        else:
            found = {0: text, **self._gather(f"{place}/in")}
            found = {process: text for process, text in found.items() if text}
            _client().key_value_set(f"{place}/out", json.dumps(found))
            # All processes are here, so none reads the older keys any more.
            for older in range(self._oldest, number):
                _client().key_value_delete(f"{self._place}/{older}")
            self._oldest = number
        return {int(process): text for process, text in found.items()}

    def _gather(self, place: str) -> dict[int, str]:
        """Collects the texts of the other processes."""
        others = {f"{place}/{process:06}": process for process in range(1, jax.process_count())}
        while True:
            found = dict(_client().key_value_dir_get(f"{place}/"))
            missing = [key for key in others if key not in found]
            if not missing:
                return {process: json.loads(found[key]) for key, process in others.items()}
            self.wait_for(missing[0])

    def share(self, text: str) -> str:
        """Returns the text of process 0 on all processes."""
        key = f"{self._place}/{next(self._exchanges)}/out"
        if jax.process_index() == 0:
            _client().key_value_set(key, json.dumps(text))
            return text
        return json.loads(self.wait_for(key))

    def wait_for(self, key: str) -> str:
        """Waits for a key of the coordinator and returns its value."""
        while True:
            self.check()
            value = _get(key, _POLL_MS)
            if value is not None:
                return value


_peers = Peers()  # used outside of any `Peers` context


def agreed(text: str) -> str:
    """Returns the first non-empty text of all processes, so that all of them act on the same one.

    Returns when all processes have called it, each the same number of times. It therefore also
    synchronises them before a collective, whose timeout may be shorter than reading a file takes.

    Args:
      text: the text of this process.

    Raises:
      UserError, Stopped: another process has failed or was asked to stop, see `Peers`.
      JaxRuntimeError: the coordinator cannot be reached.
    """
    if jax.process_count() == 1:
        return text
    found = _peers.exchange(text)
    return found[min(found)] if found else ""


def broadcast_text(text: str) -> str:
    """Returns the text of process 0 on all processes; all of them must call it.

    Raises:
      UserError, Stopped, JaxRuntimeError: see `agreed`.
    """
    return text if jax.process_count() == 1 else _peers.share(text)


def say(text: str) -> None:
    """Prints a line on process 0 only; raises errors of the stream."""
    if jax.process_index() == 0:
        print(text, flush=True)


def open_collectives() -> None:
    """Opens the connections between hosts that libraries use, while all processes are here.

    On CPUs all processes must connect within 30 s; once connected, they wait for each other.
    """
    if jax.process_count() > 1:
        agreed("")
        multihost_utils.sync_global_devices("start")


def compile_together(program: Any, *arguments: Any) -> None:
    """Compiles a jitted function, and returns when all processes have compiled it.

    Otherwise the others would wait for the slowest compilation in a collective, which may time out.
    """
    if jax.process_count() > 1:
        lower = getattr(program, "lower", None)  # stand-ins in tests have no `lower`
        if lower is not None:
            lower(*arguments).compile()
        agreed("")


def _client() -> Any:
    return distributed.global_state.client


def _get(key: str, timeout_ms: int) -> str | None:
    """Returns the value of a key; None if it does not appear within the timeout."""
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
    """Ends this process, whose main thread waits for the failed process.

    If the main thread continues after all, it waits for this thread when it leaves `Peers`.
    """
    print(f"error: {problem.error()}", file=sys.stderr, flush=True)
    # Leave the coordinator first, or the others print a trace; the timer limits the time for that.
    timer = threading.Timer(GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()
    # Not `jax.distributed.shutdown`: the main thread's requests to the client would then raise.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().shutdown()
    os._exit(1)


class Barrier:
    """A barrier for threads of all processes that do one job in several stages.

    Uses JAX's coordinator, not a device collective: only the main thread may start those. A process
    that failed joins as well and passes on its problem, so that the others do not wait for it.
    """

    def __init__(self, name: str) -> None:
        """Sets `name`, which is the same on all processes and used only once in a job."""
        self._name, self._stage = name, 0
        self.failed = False  # no process comes to this barrier any more

    def wait(self, problem: str = "") -> None:
        """Waits until all processes have reached this stage, each once.

        Args:
          problem: the problem of this process; empty if there is none.

        Raises:
          OSError: raised on all processes, with the problem of the first process that has one.
          JaxRuntimeError: the coordinator cannot be reached.
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
