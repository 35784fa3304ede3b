"""One process of test_rewind.py: trains on some bad batches and prints how the run ended.

Usage: python -m tests.faults.rewind_child WORKDIR CONFIG_JSON, with the environment of
`parallel.cluster`.
"""

import json
import pathlib
import sys

import pytest

from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.config import from_json
from llama_jax.parallel.cluster import join_job
from llama_jax.train import run
from tests.faults.test_rewind import BAD, poison

join_job(120)
config = from_json(pathlib.Path(sys.argv[2]).read_text())
with pytest.MonkeyPatch.context() as patch:
    poison(patch, *BAD)
    state = run.train(config, sys.argv[1])
print(
    "state", json.dumps([int(state.step), int(state.skips.total), fingerprint(state)]), flush=True
)
