"""One process of test_peers.py: agrees with the others on some texts, and trains nothing.

AGREE_MODE is one of `MODES`.
"""

import os
import time

import jax

from llama_jax.cli import command
from llama_jax.errors import UserError
from llama_jax.parallel import multihost
from llama_jax.parallel.cluster import join_job
from llama_jax.parallel.multihost import Peers, agreed, broadcast_text
from llama_jax.train.instruments.signals import StopRequest


def keys_left(client):
    """Returns the number of our keys that the coordinator still holds."""
    return len(client.key_value_dir_get("llama_jax/"))


def texts(me, peers):
    """Checks that the first text that is not empty wins, and that no older keys are left."""
    for number in range(40):
        # The text ends like a path that is not UTF-8.
        mine = f"{me}, ünïcode {'x' * 3000}/\udcff" if number % 3 <= me else ""
        first = min(index for index in range(jax.process_count()) if number % 3 <= index)
        text = agreed(mine)
        assert text.startswith(f"{first}, ünïcode xxx") and text.endswith("/\udcff")
        assert agreed("") == ""
        assert broadcast_text(f"{me} {number}") == f"0 {number}"
    if me == 0:
        print("keys", keys_left(multihost._client()), flush=True)
    agreed("")


def fails(me, peers):
    """Lets process 2 fail while process 0 works and process 1 waits for it."""
    if me == 2:
        raise UserError("the disk is\n  on fire")
    if me == 0:
        time.sleep(3600)  # a signal interrupts this, as it does most Python code
    agreed("")


def stuck(me, peers):
    """Lets process 0 fail while nothing can interrupt processes 1 and 2."""
    if me == 0:
        raise KeyError("a bug")
    peers._interrupt = lambda: None
    time.sleep(3600)


def waits(me, peers):
    """Lets all processes wait for process 0, which works for ever."""
    print("waits", flush=True)
    if me == 0:
        time.sleep(3600)
    agreed("")


def ends_late(me, peers):
    """Lets process 0 fail when the others have finished."""
    agreed("")
    if me == 0:
        raise OSError(28, "No space left on device")


MODES = {mode.__name__: mode for mode in (texts, fails, stuck, waits, ends_late)}


def main():
    join_job(120)
    with StopRequest() as stop, Peers(stop.interrupt) as peers, stop.at_once():
        MODES[os.environ["AGREE_MODE"]](jax.process_index(), peers)
    print("through", flush=True)


command.run(main, __doc__)
