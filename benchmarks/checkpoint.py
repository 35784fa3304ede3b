"""What verified checkpoints cost: the step, a save, hashing and the fingerprint. One line of JSON.

Example:
  python benchmarks/checkpoint.py --config=configs/tiny.py --steps=200 --every=100
"""

import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
from absl import flags
from etils import epath

from llama_jax import cli, manifest
from llama_jax.checkpoint import Meta
from llama_jax.checkpointer import Checkpointer
from llama_jax.data.loader import SyntheticBatches, stream
from llama_jax.errors import UserError
from llama_jax.fingerprint import fingerprint
from llama_jax.mesh import make_mesh
from llama_jax.step import jit_step


def seconds(call: Callable[[], object]) -> float:
    """Wall time of `call()`."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Trains on synthetic tokens, with and without saves, and times the parts of one."""
    config = cli.load_config(_CONFIG)
    train = config.train
    if _STEPS.value < 2 * _EVERY.value:
        raise UserError("--steps must be at least twice --every")
    mesh = make_mesh(config.mesh, config.dcn)
    source = SyntheticBatches(config.model.vocab_size, train.seq_len, train.global_batch, 0)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        compiled = jit_step(config, mesh)
        state = compiled.init(jax.random.key(0))
        shape = (train.global_batch, train.seq_len)
        batches = stream(source, 0, 4 * _STEPS.value, compiled.batch_sharding, *shape)
        saver = Checkpointer(folder, config)
        blocked = []

        def run(saving: bool) -> float:
            nonlocal state
            start = time.perf_counter()
            for _ in range(_STEPS.value):
                state, _metrics = compiled.train(state, next(batches))
                step = int(jax.device_get(state.step))
                if saving and step % _EVERY.value == 0:
                    meta = Meta(config, step, "benchmark", b"")
                    before = time.perf_counter()
                    saver.save(state, meta)
                    blocked.append(time.perf_counter() - before)
            saver.wait()
            return (time.perf_counter() - start) / _STEPS.value

        jax.block_until_ready(compiled.train(state, next(batches))[0].params)
        state = compiled.init(jax.random.key(0))
        fingerprint(state)
        plain, saving, again = run(False), run(True), run(False)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        prints = [seconds(lambda: fingerprint(state)) for _ in range(5)]
        newest = epath.Path(saver.folder(saver.latest_step() or 0))
        files = [path for path in pathlib.Path(newest).rglob("*") if path.is_file()]
        on_disk = sum(path.stat().st_size for path in files)
        hashing = min(seconds(lambda: manifest.damage(newest)) for _ in range(3))
        saver.close()
    base = (plain + again) / 2
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "state_bytes": size,
                "step_seconds_without_saves": base,
                "step_seconds_with_saves": saving,
                "save_every": _EVERY.value,
                "overhead": saving / base - 1,
                "save_blocks_seconds": statistics.median(blocked),
                "save_blocks_share": statistics.median(blocked) / (_EVERY.value * base),
                "fingerprint_seconds": statistics.median(prints),
                "fingerprint_bytes_per_second": size / statistics.median(prints),
                "checkpoint_bytes": on_disk,
                "verify_seconds": hashing,
                "verify_bytes_per_second": on_disk / hashing,
            }
        )
    )


if __name__ == "__main__":
    _CONFIG = cli.config_flag()
    _STEPS = flags.DEFINE_integer("steps", 200, "Steps of each of the three runs.", lower_bound=2)
    _EVERY = flags.DEFINE_integer("every", 100, "Steps between saves.", lower_bound=1)
    cli.run(main, __doc__)
