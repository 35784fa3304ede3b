"""Runs `python -m llama_jax.train`, and kills it before one of its steps.

KILL_AT is the number of steps that it makes before, and KILL_SAVED the folder of the newest
checkpoint, which is complete then: so the next start goes on from a known step. All processes are
killed, as those of a job are. Without KILL_AT, this is the command itself.
"""

import os
import pathlib
import runpy
import signal

from llama_jax.train import loop
from tests.helpers import until


def killed(self, state, batch, step, take_step=loop._Actions.take_step):
    if step == int(os.environ["KILL_AT"]):
        until(pathlib.Path(os.environ["KILL_SAVED"]).exists)
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self, state, batch, step)


if "KILL_AT" in os.environ:
    loop._Actions.take_step = killed
runpy.run_module("llama_jax.train", run_name="__main__", alter_sys=True)
