"""Renders chat templates in a separate process, with limits of time and memory."""

import functools
import os
import signal
import subprocess
import threading
from typing import Any

from llama_jax.errors import UserError, first_line
from llama_jax.text import child_process, jinja_process

SECONDS = 10  # processor time for one conversation
MEMORY = 2**30  # bytes


class Refused(UserError):
    """A template rejects these messages."""


class Exceeded(UserError):
    """A template takes more time or memory than the limits."""


class Renderer:
    """A process that renders templates one after another, and starts at the first request."""

    def __init__(self, seconds: int = SECONDS, memory: int = MEMORY) -> None:
        """Stores the limits; starts no process yet.

        Args:
          seconds: processor time that one conversation may take.
          memory: bytes of address space that the process may have.
        """
        self._seconds, self._memory = seconds, memory
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, name: str, variables: dict[str, Any]) -> str:
        """Returns the text that a template renders.

        Args:
          source: the Jinja code.
          name: name of the template in errors.
          variables: variables of the template, of types that JSON has.

        Raises:
          Refused: the template fails on these variables, or writes a text that is too long.
          Exceeded: the template takes more time or memory than the limits.
          UserError: the template is not valid Jinja.
        """
        return self._ask({"source": source, "variables": variables}, name)

    def check(self, source: str, name: str) -> None:
        """Raises `UserError` if a template is not valid Jinja."""
        self._ask({"source": source}, name)

    def _ask(self, request: dict[str, Any], name: str) -> str:
        try:
            message = jinja_process.encode_message(request)
        except (RecursionError, TypeError, ValueError) as error:
            raise Refused(f"{name} takes only JSON messages: {first_line(error)}") from error
        with self._lock:
            kind, text = self._exchange(message, name)
        if kind == "text":
            return text
        if kind == "memory":
            raise Exceeded(f"{name} takes more than {self._memory / 2**20:,.0f} MiB of memory")
        if kind == "long":
            raise Refused(f"{name} writes more than {jinja_process.LONGEST_TEXT:,} characters")
        reason = text.strip().split("\n")[0]
        if kind == "not Jinja":
            raise UserError(f"{name} is not a chat template: {reason}")
        raise Refused(f"{name} does not take these messages: {reason}")

    def _exchange(self, message: bytes, name: str) -> list[str]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(message)
            process.stdin.flush()
            return jinja_process.read_message(process.stdout)
        except (EOFError, OSError) as error:
            status = self._ended(process)
            if status == -signal.SIGXCPU:
                limit = f"more than {self._seconds} s of processor time"
                raise Exceeded(f"{name} takes {limit}") from error
            raise Exceeded(f"{name} ends the process that renders it (status {status})") from error
        except BaseException:
            # After an interrupt, the next request would read the answer to this one.
            process.kill()
            self._ended(process)
            raise

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None or self._process.poll() is not None:
            limits = (str(self._seconds), str(self._memory))
            self._process = child_process.start(jinja_process.__name__, *limits)
        return self._process

    def _ended(self, process: "subprocess.Popen[bytes]") -> int:
        """Waits for a process that has ended or is about to end, and returns its exit status."""
        self._process = None
        return child_process.close(process)


@functools.cache
def _of_process(pid: int) -> Renderer:
    return Renderer()


def shared() -> Renderer:
    """Returns the renderer of this process; a fork gets its own renderer."""
    return _of_process(os.getpid())
