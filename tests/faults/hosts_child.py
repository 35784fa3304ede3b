"""One process of test_hosts.py: goes on from the newest step, says its fingerprint, saves the next.

Usage: python -m tests.faults.hosts_child WORKDIR, with the environment of `processes`.
"""

import json
import sys

import jax

from llama_jax.checkpoint import Meta
from llama_jax.checkpointer import Checkpointer
from llama_jax.fingerprint import fingerprint
from llama_jax.mesh import make_mesh
from llama_jax.processes import start_processes
from llama_jax.step import jit_step
from tests.helpers import TINY

start_processes(120)
mesh = make_mesh(TINY.mesh, TINY.dcn)
with jax.set_mesh(mesh), Checkpointer(sys.argv[1], TINY) as saver:
    compiled = jit_step(TINY, mesh)
    step = saver.newest_good_step()
    if step is None:
        step, state = 0, compiled.init(jax.random.key(0))
    else:
        state = saver.restore(step, compiled.state_shardings)
    print("state", json.dumps([step, jax.process_count(), fingerprint(state)]), flush=True)
    saver.save(state, Meta(TINY, step + 1, "made up", b""))
    saver.wait()
