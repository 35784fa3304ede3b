"""Saves steps 1, 2, .. of a model of about 30 MB until it is killed; prints each start and end.

Started by test_kill_in_save.py, as `python -m tests.faults.saving_child WORKDIR`.
"""

import sys

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.saved_step import StepMeta
from tests.faults.test_kill_in_save import CONFIG, state_of

with Checkpointer(sys.argv[1], CONFIG) as saver:
    first = (saver.newest_good_step() or 0) + 1
    for step in range(first, first + 1000):
        state = state_of(step)
        print(f"saving {step}", flush=True)
        saver.save(state.to_items(), StepMeta(CONFIG, step, "made up", b"tokenizer"))
        saver.wait()
        print(f"saved {step}", flush=True)
