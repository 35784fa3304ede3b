"""`python -m llama_jax.train` of which one phase takes long, and says so: `phase PHASE`.

SLOW_PHASE is data, restore, compile, evaluate (each batch of it) or save; SLOW_SECONDS is how long,
or until there is a file SLOW_UNTIL; SLOW_PROCESS is the process that it takes long, default: each.
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
            # In slices: a signal just before `sleep` begins would be handled when it ends.
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


if PHASE == "save":  # of process 0, when all is written
    manifest.write = slow(manifest.write)
elif PHASE == "data":
    run.open_data = slow(run.open_data)
elif PHASE == "restore":
    Checkpointer.restore = slow(Checkpointer.restore)
else:
    slow_step({"compile": "train", "evaluate": "evaluate"}[PHASE])
runpy.run_module("llama_jax.train", run_name="__main__", alter_sys=True)
