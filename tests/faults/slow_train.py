"""Runs `python -m llama_jax.train` with one slow phase, which it announces as `phase PHASE`.

SLOW_PHASE is data, restore, compile, evaluate (each batch of it) or save. SLOW_SECONDS is how long
the phase takes, unless the file SLOW_UNTIL ends it earlier. SLOW_PROCESS is the process that is
slow; default: all.
"""

import dataclasses
import itertools
import os
import runpy
import time

from llama_jax.checkpoint import manifest
from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.train import run

PHASE, SECONDS = os.environ["SLOW_PHASE"], float(os.environ["SLOW_SECONDS"])
UNTIL = os.environ["SLOW_UNTIL"]
if os.environ.get("SLOW_PROCESS", "") not in ("", os.environ.get("JAX_PROCESS_ID", "")):
    SECONDS = 0.0


def slow(function):
    calls = itertools.count()

    def slower(*args, **kwargs):
        call = next(calls)
        if call == 0:
            print(f"phase {PHASE}", flush=True)
        if call == 0 or PHASE == "evaluate":
            # In slices: a signal that arrives just before `sleep` is handled only when it returns.
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline and not os.path.exists(UNTIL):
                time.sleep(min(SECONDS, 0.1))
        return function(*args, **kwargs)

    return slower


def slow_step(name):
    jit_step = run.jit_step

    def patched(*args):
        compiled = jit_step(*args)
        return dataclasses.replace(compiled, **{name: slow(getattr(compiled, name))})

    run.jit_step = patched


if PHASE == "save":  # on process 0, when all files are written
    manifest.write = slow(manifest.write)
elif PHASE == "data":
    run.open_data = slow(run.open_data)
elif PHASE == "restore":
    Checkpointer.restore = slow(Checkpointer.restore)
else:
    slow_step({"compile": "train", "evaluate": "evaluate"}[PHASE])
runpy.run_module("llama_jax.train", run_name="__main__", alter_sys=True)
