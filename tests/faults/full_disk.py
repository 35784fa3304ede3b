"""Runs `python -m llama_jax.train`, whose disk is full from the save of step 8 on.

Usage: python -m tests.faults.full_disk HOW FLAGS; HOW is `full` (the disk has no room from the
start) or `fills up` (no file may grow beyond 4 KB). When that save begins, the save of step 4 is
still being written.
"""

import collections
import os
import resource
import runpy
import shutil
import signal
import sys
import threading

from llama_jax.checkpoint import checkpointer

HOW = sys.argv.pop(1)
rename, save, begun = os.rename, checkpointer.Checkpointer.save, threading.Event()


def late_rename(source, target, **kwargs):
    if "/4.saving.orbax-checkpoint-tmp" in os.fspath(source):
        begun.wait()
    return rename(source, target, **kwargs)


def save_on_a_full_disk(self, items, meta):
    if meta.step == 8:
        begun.set()
        self._settle()
        if HOW == "full":
            shutil.disk_usage = lambda path: collections.namedtuple("U", "free")(1000)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return save(self, items, meta)


signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
os.rename = late_rename
checkpointer.Checkpointer.save = save_on_a_full_disk
runpy.run_module("llama_jax.train", run_name="__main__", alter_sys=True)
