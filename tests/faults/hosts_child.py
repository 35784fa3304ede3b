"""One process of test_hosts.py.

It resumes from the newest step, prints the state's fingerprint and the hashes of the next batches,
trains on these batches if it gets the argument `train`, and saves the step that it reaches.

Usage: python -m tests.faults.hosts_child WORKDIR SHARDS [train], with the environment of
`parallel.cluster`.
"""

import hashlib
import json
import sys

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.saved_step import StepMeta
from llama_jax.data.loader import device_batches
from llama_jax.data.training_data import open_data
from llama_jax.parallel.cluster import join_job
from llama_jax.parallel.mesh import make_mesh
from llama_jax.train.step import jit_step
from tests.helpers import restored_state, text_config

BATCHES = 3


def sha(batch):
    """Returns the sha256 of all rows, on whichever process they are."""
    found = hashlib.sha256()
    for name in sorted(batch):
        rows = multihost_utils.process_allgather(batch[name], tiled=True)
        found.update(np.ascontiguousarray(rows).tobytes())
    return found.hexdigest()


def main():
    config = text_config("unused", data__path=sys.argv[2])
    join_job(120)
    mesh = make_mesh(config.mesh, config.dcn)
    with jax.set_mesh(mesh), Checkpointer(sys.argv[1], config) as saver:
        compiled = jit_step(config, mesh)
        step = saver.newest_good_step()
        if step is None:
            step, state = 0, compiled.init(jax.random.key(0))
        else:
            state = restored_state(saver, step, config, compiled.state_shardings)
        print("state", json.dumps([step, jax.process_count(), fingerprint(state)]), flush=True)
        shape = (config.train.global_batch, config.train.seq_len)
        data = open_data(config, epath.Path("unused")).train
        batches = device_batches(data, step, step + BATCHES, compiled.batch_sharding, *shape)
        hashes, reached = {}, step + 1
        for number, batch in enumerate(batches, start=step):
            hashes[number] = sha(batch)
            if "train" in sys.argv:
                state, _ = compiled.train(state, batch)
                reached = number + 1
        print("batches", json.dumps(hashes), flush=True)
        saver.save(state.to_items(), StepMeta(config, reached, "made up", b""))
        saver.wait()


main()
