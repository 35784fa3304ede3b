"""Runs `python -m llama_jax.prepare`, or `train`, which stops at some parts until the test says so.

SLOW_FROM is the number of the first part that waits, SLOW_UNTIL the file that ends the wait. A
waiting part announces itself by a file SLOW_UNTIL with the part's number appended. SLOW_COMMAND is
the command. Worker processes import this module, too.
"""

import functools
import os
import pathlib
import runpy
import time

from llama_jax.data.prepare import tokenize, workers

FROM, UNTIL = int(os.environ["SLOW_FROM"]), pathlib.Path(os.environ["SLOW_UNTIL"])
write_part = tokenize.write_part


@functools.wraps(write_part)  # so that a pool's workers find it under the name of the original
def slow(data, pack_len, folder, index, *rest, **options):
    if index >= FROM:
        pathlib.Path(f"{UNTIL}{index}").touch()
        while not UNTIL.exists():
            time.sleep(0.05)
    return write_part(data, pack_len, folder, index, *rest, **options)


tokenize.write_part = workers.write_part = slow
if __name__ == "__main__":
    # Not with alter_sys, because workers import the main module, which must be this one.
    runpy.run_module(os.environ["SLOW_COMMAND"], run_name="__main__")
