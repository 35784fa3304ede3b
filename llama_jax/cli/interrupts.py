"""Ctrl-C while a command imports its libraries, which takes seconds.

Python would print the traceback of whatever import is under way, and some libraries swallow the
exception.
"""

import os
import signal
from types import FrameType

STATUS = 130  # of a shell, for a command that Ctrl-C has ended
MESSAGE = "\ninterrupted"


def end_quietly() -> None:
    """Lets Ctrl-C end the process at once, with one line, until `raise_again`."""
    # Ignored in the background of a shell without job control: it stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Lets Ctrl-C raise `KeyboardInterrupt` again, as Python does."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(STATUS)  # nothing is open yet; an exception could be swallowed
