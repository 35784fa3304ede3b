"""Child processes: how they are started, talked to, and end with the one that started them.

Both ends import this, so it imports nothing of the package. A child that talks gets messages on its
standard input and answers on its standard output; each is its length (8 bytes, little-endian) and
JSON.
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
    """Starts a module of this package as a child that talks; what it says on stderr is dropped."""
    # Not `-m`: the package must be found without that what lies beside it, or in the current
    # folder, hides the modules of the standard library.
    code = f"import runpy, sys; sys.path.append({str(_ROOT)!r}); runpy.run_module({module!r}, "
    code += "run_name='__main__')"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def close(process: "subprocess.Popen[bytes]") -> int:
    """Closes the pipes of a child that has ended, or was killed; returns its exit status."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not sent
            pipe.close()  # type: ignore[union-attr]
    return process.wait()


def exit_with_parent() -> None:
    """For a child that talks: it ends when its parent does, and leaves signals to its parent.

    A terminal or a launcher sends them to all processes of a group.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    end_with(0)


def end_with(file: int) -> None:
    """Ends this process, whatever it does, when nobody has the other end of a pipe any more."""

    def watch() -> None:
        poll = select.poll()
        poll.register(file, 0)  # no event but a hang-up, which is always reported
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_message(stream: IO[bytes]) -> Any:
    """The next message.

    Raises:
      EOFError: the other end has gone.
    """
    size = _exactly(stream, 8)
    return json.loads(_exactly(stream, int.from_bytes(size, "little")))


def _exactly(stream: IO[bytes], size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def encode_message(message: Any) -> bytes:
    """A message as it goes through a pipe.

    Raises:
      TypeError, ValueError: it is not JSON.
    """
    content = json.dumps(message).encode()
    return len(content).to_bytes(8, "little") + content
