"""Handling of Ctrl-C while a command imports its libraries, which takes seconds.

Without it, Python would print the traceback of the current import, and some libraries would swallow
the exception.
"""

import os
import signal
from types import FrameType

STATUS = 130  # the status that shells report after Ctrl-C
MESSAGE = "\ninterrupted"


def end_quietly() -> None:
    """Makes Ctrl-C end the process at once, with one line, until `raise_again`."""
    # A shell without job control ignores it in background jobs; keep that.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Makes Ctrl-C raise `KeyboardInterrupt` again, as in Python."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(STATUS)  # nothing is open yet; an exception could be swallowed
