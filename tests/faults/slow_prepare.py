"""`python -m llama_jax.prepare`, or `train`, that stands still at a part until the test lets it go.

SLOW_FROM is the number of the first part that does, SLOW_UNTIL the file that ends it; before that,
SLOW_UNTIL with the part's number behind it says that a part stands still. SLOW_COMMAND is the
command. Worker processes import this, too.
"""

import functools
import os
import pathlib
import runpy
import time

from llama_jax.data.prepare import tokenize, workers

FROM, UNTIL = int(os.environ["SLOW_FROM"]), pathlib.Path(os.environ["SLOW_UNTIL"])
write_part = tokenize.write_part


@functools.wraps(write_part)  # so that a pool finds it in its workers under the name of the other
def slow(data, pack_len, folder, index, *rest, **options):
    if index >= FROM:
        pathlib.Path(f"{UNTIL}{index}").touch()
        while not UNTIL.exists():
            time.sleep(0.05)
    return write_part(data, pack_len, folder, index, *rest, **options)


tokenize.write_part = workers.write_part = slow
if __name__ == "__main__":
    # Without alter_sys: workers import the main module, which must be this one.
    runpy.run_module(os.environ["SLOW_COMMAND"], run_name="__main__")
