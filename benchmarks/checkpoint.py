"""Measures the cost of verified checkpoints: the step, a save, hashing and the fingerprint.

Prints one line of JSON. Turns of `--every` steps are timed in pairs: one turn begins with a save,
and the other has none. `overhead` is the mean over pairs of (time with a save / time without) - 1;
its standard error and the values of the pairs are given, too. `cpu_overhead` is the same for the
CPU seconds of the process, which include the work of a save in the background; a noisy machine
changes them less.

Example:
  python benchmarks/checkpoint.py --config=configs/tiny.py --every=100 --pairs=4
"""

import itertools
import json
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
from absl import flags
from etils import epath

from llama_jax.checkpoint import manifest
from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.saved_step import StepMeta
from llama_jax.cli import command
from llama_jax.data.batches import SyntheticBatches
from llama_jax.data.loader import device_batches
from llama_jax.parallel.mesh import make_mesh
from llama_jax.train.step import jit_step

_WARMUP = 5  # steps before the measurement


def seconds(call: Callable[[], object]) -> float:
    """Returns the wall time of `call()` in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


Times = tuple[float, float]  # wall time and CPU time, in seconds


def in_turns(turn: Callable[[bool], Times], pairs: int) -> Iterator[tuple[Times, Times]]:
    """Yields the times (without a save, with a save) of each pair of turns.

    The order of the turns alternates from pair to pair, so that drift cancels.
    """
    for number in range(pairs):
        first = turn(bool(number % 2))
        second = turn(not number % 2)
        plain, saving = (second, first) if number % 2 else (first, second)
        wall, cpu = (
            with_save / without - 1 for without, with_save in zip(plain, saving, strict=True)
        )
        print(f"pair {number + 1} of {pairs}: {wall:+.2%}, CPU {cpu:+.2%}", file=sys.stderr)
        yield plain, saving


def main() -> None:
    """Trains on synthetic tokens with and without saves, and times the parts of a save."""
    config = command.load_config(_CONFIG)
    train, every, pairs = config.train, _EVERY.value, _PAIRS.value
    mesh = make_mesh(config.mesh, config.dcn)
    source = SyntheticBatches(config.model.vocab_size, train.seq_len, train.global_batch, 0)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        compiled = jit_step(config, mesh)
        state = compiled.init(jax.random.key(0))
        shape = (train.global_batch, train.seq_len)
        count = every * 2 * pairs + 2 * _WARMUP
        batches = device_batches(source, 0, count, compiled.batch_sharding, *shape)
        saver = Checkpointer(folder, config)
        blocked: list[float] = []

        def turn(saving: bool, steps: int = every) -> Times:
            """Runs steps, the first one with a save if `saving`; returns their times."""
            nonlocal state
            start, cpu = time.perf_counter(), time.process_time()
            for number in range(steps):
                state, _ = compiled.train(state, next(batches))
                step = int(jax.device_get(state.step))
                if saving and number == 0:
                    meta = StepMeta(config, step, "benchmark", b"")
                    blocked.append(seconds(lambda: saver.save(state.to_items(), meta)))  # noqa: B023
            saver.wait()
            return time.perf_counter() - start, time.process_time() - cpu

        def save_alone(number: int) -> float:
            """Returns the CPU seconds of a save, with its work in the background."""
            cpu = time.process_time()
            saver.save(
                state.to_items(), StepMeta(config, int(state.step) + number, "benchmark", b"")
            )
            saver.wait()
            return time.process_time() - cpu

        turn(True, _WARMUP)  # compiles, and takes the first save, which is slower
        times = list(in_turns(turn, pairs))
        alone = statistics.median(save_alone(number) for number in range(1, 6))
        prints = [seconds(lambda: fingerprint(state)) for _ in range(5)]
        newest = epath.Path(saver.folder(saver.latest_step() or 0))
        files = [path for path in pathlib.Path(newest).rglob("*") if path.is_file()]
        on_disk = sum(path.stat().st_size for path in files)
        hashing = min(seconds(lambda: manifest.first_damage(newest)) for _ in range(3))
        saver.close()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    plain = [without[0] for without, _ in times]
    ratios, cpu_ratios = (
        [saving[kind] / without[kind] - 1 for without, saving in times] for kind in (0, 1)
    )
    base = statistics.mean(plain) / every
    # The difference between turns without a save: an overhead below it means nothing.
    noise = [abs(later / sooner - 1) for sooner, later in itertools.pairwise(plain)]
    print(
        json.dumps(
            {
                "device": jax.devices()[0].device_kind,
                "state_bytes": size,
                "save_every": every,
                "step_seconds_without_saves": base,
                "step_seconds_with_saves": statistics.mean(saving[0] for _, saving in times)
                / every,
                "overhead": statistics.mean(ratios),
                "overhead_standard_error": statistics.stdev(ratios) / math.sqrt(pairs),
                "overhead_of_pairs": [round(ratio, 5) for ratio in ratios],
                "cpu_overhead": statistics.mean(cpu_ratios),
                "cpu_overhead_standard_error": statistics.stdev(cpu_ratios) / math.sqrt(pairs),
                "cpu_overhead_of_pairs": [round(ratio, 5) for ratio in cpu_ratios],
                "plain_turns_differ_by": statistics.median(noise),
                "save_cpu_seconds": alone,
                "save_cpu_share": alone / statistics.mean(without[1] for without, _ in times),
                "save_blocks_seconds": statistics.median(blocked[1:]),
                "save_blocks_share": statistics.median(blocked[1:]) / (every * base),
                "fingerprint_seconds": statistics.median(prints),
                "fingerprint_bytes_per_second": size / statistics.median(prints),
                "checkpoint_bytes": on_disk,
                "verify_seconds": hashing,
                "verify_bytes_per_second": on_disk / hashing,
            }
        )
    )


if __name__ == "__main__":
    _CONFIG = command.config_flag()
    _EVERY = flags.DEFINE_integer("every", 100, "Steps between saves.", lower_bound=1)
    _PAIRS = flags.DEFINE_integer(
        "pairs", 4, "Pairs of a turn with a save and one without.", lower_bound=2
    )
    command.run(main, __doc__)
