"""Runs `python -m llama_jax.train` in several processes, of which one fails in one stage.

FAIL_STAGE is a key of `PLACES`, whose function raises on process FAIL_PROCESS when it is called, or
"step", which raises at the third batch. FAIL_WITH is the error: UserError, OSError, KeyError (a
bug) or damage.
"""

import os
import runpy

from llama_jax.checkpoint import saved_step
from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.errors import UserError
from llama_jax.train import loop, run, start

ERRORS = {
    "UserError": UserError("made to fail,\n  on two lines"),
    "OSError": OSError(28, "No space left on device"),
    "KeyError": KeyError("a bug"),
    "damage": saved_step.DamagedCheckpoint("made to be damaged"),
}
PLACES = {
    "lock": (run, "locked"),
    "workdir": (run, "check_workdir"),
    "init": (run, "open_weights"),
    "data": (run, "open_data"),
    "open": (Checkpointer, "__init__"),
    "first_state": (start, "first_state"),
    "meta": (start, "load_meta"),
    "restore": (Checkpointer, "restore"),
    "item": (saved_step, "_restore_item"),
    "batch": (loop, "device_batches"),
}


def fail(*_, **__):
    raise ERRORS[os.environ["FAIL_WITH"]]


def third_fails(*arguments, device_batches=loop.device_batches):
    batches = device_batches(*arguments)
    yield next(batches)
    yield next(batches)
    fail()


if os.environ["FAIL_PROCESS"] == os.environ["JAX_PROCESS_ID"]:
    stage = os.environ["FAIL_STAGE"]
    if stage == "step":
        loop.device_batches = third_fails
    else:
        setattr(*PLACES[stage], fail)
runpy.run_module("llama_jax.train", run_name="__main__", alter_sys=True)
