"""One process of test_hosts.py: trains and saves, while one of two processes fails in each way.

Usage: python -m tests.faults.failing_child WORKDIR, with the environment of `parallel.cluster`.
"""

import resource
import sys
import time
from unittest import mock

import jax
from etils import epath

from llama_jax.checkpoint import manifest
from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.saved_step import StepMeta
from llama_jax.errors import UserError
from llama_jax.parallel.cluster import join_job
from llama_jax.parallel.mesh import make_mesh
from llama_jax.train.instruments.writers import AllWriters, JsonlWriter
from llama_jax.train.step import jit_step
from tests.helpers import TINY, random_batch, replace

CONFIG = replace(TINY, train__max_failed_saves=9)
FULL = OSError(28, "No space left on device")


def small_files(saver):
    """Limits the size of files that this process writes to 1 KB, so that its writes fail."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, old[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, old)


def broken(target, name):
    patch = mock.patch.object(target, name, side_effect=FULL)
    patch.start()
    return patch.stop


def broken_start(saver):
    """Makes the synchronous part of orbax's save fail, after the steps that all processes share."""
    start = saver._background._orbax.handler.async_save

    async def fails(*args, **kwargs):
        await start(*args, **kwargs)
        raise FULL

    saver._background._orbax.handler.async_save = fails
    return lambda: setattr(saver._background._orbax.handler, "async_save", start)


# The process that fails, and the function that makes it fail.
FAULTS = {
    "starts": (1, broken_start),
    "writes": (1, small_files),
    "commits": (0, lambda saver: broken(saver._background._orbax.handler, "finalize")),
    "hashes": (0, lambda saver: broken(manifest, "write")),
}


def main():
    join_job(120)
    mesh = make_mesh(CONFIG.mesh, CONFIG.dcn)
    log = [JsonlWriter(epath.Path(sys.argv[1]) / "metrics.jsonl")] * (jax.process_index() == 0)
    on_event = AllWriters(lambda: log).event
    with jax.set_mesh(mesh), Checkpointer(sys.argv[1], CONFIG, on_event) as saver:
        compiled = jit_step(CONFIG, mesh)
        state = compiled.init(jax.random.key(0))
        host = random_batch(CONFIG, 0)
        batch = {
            name: jax.make_array_from_callback(x.shape, compiled.batch_sharding, x.__getitem__)
            for name, x in host.items()
        }

        def train_and_save():
            nonlocal state
            # Two programs at once confuse gloo; the loop waits before a save, too.
            state, _ = jax.block_until_ready(compiled.train(state, batch))
            saver.save(state.to_items(), StepMeta(CONFIG, int(state.step), "made up", b""))

        train_and_save()
        saver.wait()
        for process, begin in FAULTS.values():
            end = begin(saver) if jax.process_index() == process else lambda: None
            began = time.monotonic()
            train_and_save()
            try:
                saver.wait()
            except UserError:
                print("waited", time.monotonic() - began, flush=True)
            end()
        train_and_save()
        saver.wait()
        print("trained", int(state.step), flush=True)


if __name__ == "__main__":
    main()
