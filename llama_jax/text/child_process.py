"""Child processes that exchange messages with their parent through pipes, and end with it.

Both processes import this module, so it imports nothing else from the package. A child reads
messages from its standard input and writes answers to its standard output. A message is its length
in bytes (8 bytes, little-endian), followed by JSON.
"""

import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import threading
from typing import IO, Any

_ROOT = pathlib.Path(__file__).parents[2]


def start(module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """Starts a module of this package as a child process with pipes, and drops its stderr."""
    # Not with `-m`, which puts the current folder first on the path: a file in it could hide a
    # module of the standard library. For the same reason, the folder of the package comes last.
    code = f"import runpy, sys; sys.path.append({str(_ROOT)!r}); runpy.run_module({module!r}, "
    code += "run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def close(process: "subprocess.Popen[bytes]") -> int:
    """Closes the pipes of a child that has ended or was killed, and returns its exit status."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # closing fails if unsent data are left
            pipe.close()  # type: ignore[union-attr]
    return process.wait()


def exit_with_parent() -> None:
    """Makes this child process end when its parent ends, and ignore signals.

    A terminal or a launcher sends signals to all processes of a group; only the parent handles
    them.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with(0)


def end_with(file: int) -> None:
    """Ends this process, whatever it does, when the other end of a pipe is closed."""

    def watch() -> None:
        poll = select.poll()
        poll.register(file, 0)  # waits only for a hang-up, which is always reported
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_message(stream: IO[bytes]) -> Any:
    """Reads the next message.

    Raises:
      EOFError: the other end is closed.
    """
    size = _exactly(stream, 8)
    return json.loads(_exactly(stream, int.from_bytes(size, "little")))


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def encode_message(message: Any) -> bytes:
    """Returns the bytes of a message in a pipe.

    Raises:
      TypeError, ValueError: JSON cannot hold the message.
    """
    content = json.dumps(message).encode()
    return len(content).to_bytes(8, "little") + content
