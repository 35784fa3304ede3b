"""Kills a run at random times until it has finished, and compares it bit for bit with a twin.

Example:
  python -m tests.faults.soak --kills=50
  python -m tests.faults.soak --minutes=60 --processes=2
"""

import argparse
import collections
import hashlib
import json
import pathlib
import random
import re
import signal
import statistics
import sys
import tempfile
import time

import jax
import numpy as np
from etils import epath

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.retention import saved_steps
from llama_jax.checkpoint.saved_step import CHECKPOINTS, find_step, load_meta
from llama_jax.parallel.cluster import MEETING_S
from llama_jax.train.step import jit_step
from tests.helpers import mesh_of, outputs_of, records, restored_state, start_train, write_corpus

# SIGKILL is twice as frequent, because a process cannot prepare for it.
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)


def digest(workdir):
    """Returns the sha256 of the whole newest state: weights, moments, counters."""
    folder = find_step(workdir)
    config = load_meta(folder).config
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh), Checkpointer(workdir, config) as saver:
        shardings = jit_step(config, mesh).state_shardings
        state = restored_state(saver, int(folder.name), config, shardings)
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def losses(workdir):
    """Returns the loss of each step; if a step was logged twice, the last one."""
    return {line["step"]: line["loss"] for line in records(workdir) if "loss" in line}


def run_to_end(corpus, workdir, flags, options):
    """Runs to the end, and returns the seconds that it took."""
    began = time.monotonic()
    running = start_train(corpus, workdir, *flags, **options)
    outputs = outputs_of(running, 1200)
    if any(process.returncode for process in running):
        raise AssertionError(outputs)
    return time.monotonic() - began


def disturb(corpus, workdir, flags, options, rng, steps):
    """Sends one process of the run a signal, while it starts or at some step.

    Returns:
      The signal's name, or "" if the run finished first; the exit statuses; and a list with the
      seconds from the start to the first step, empty if no step was reached.
    """
    began, first_step = time.monotonic(), []
    running = start_train(corpus, workdir, *flags, **options)
    victim, number = rng.choice(running), rng.choice(SIGNALS)
    at_step = rng.randrange(1, steps)
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 5))  # imports, data, restoring, compiling
    else:
        for line in running[0].stdout:
            found = re.match(r"step +(\d+)/", line)
            if found and not first_step:
                first_step.append(time.monotonic() - began)
            if found and int(found[1]) >= at_step:
                break
        time.sleep(rng.uniform(0, 0.2))
    finished = all(process.poll() == 0 for process in running)
    if not finished:
        victim.send_signal(number)
    # If one is killed before all have connected, the others wait for it.
    outputs = outputs_of(running, MEETING_S + 60)
    statuses = [process.returncode for process in running]
    # Before our handler is installed, SIGTERM just ends a process.
    if number == signal.SIGTERM and len(running) == 1 and set(statuses) - {0, -number}:
        raise AssertionError(outputs)
    return "" if finished else number.name, statuses, first_step


def newest(workdir):
    """Returns the newest complete step; 0 if there is none."""
    return max(saved_steps(epath.Path(workdir) / CHECKPOINTS), default=0)


def soak(
    corpus,
    folder,
    *,
    kills,
    minutes=0.0,
    processes=1,
    devices=None,
    steps=60,
    seed=0,
    fresh=True,
    log=print,
):
    """Runs an undisturbed twin, and other runs that are disturbed until they finish.

    Returns:
      How often each signal was sent, and whether all losses and last states are equal.
    """
    flags = [f"--config.train.steps={steps}", "--config.train.eval_every=1000"]
    flags += ["--config.train.checkpoint_every=5", "--config.train.log_every=1"]
    twin, options = folder / "twin", {"processes": processes, "devices": devices, "fresh": fresh}
    seconds = run_to_end(corpus, twin, flags, options)
    log(f"undisturbed: {steps} steps in {seconds:.1f} s", flush=True)
    expected = digest(twin), losses(twin)
    rng, sent, end = random.Random(seed), collections.Counter(), time.monotonic() + minutes * 60
    disturbed, first_steps, equal = [], [], True
    while sent.total() < kills or time.monotonic() < end:
        disturbed.append(folder / f"disturbed{len(disturbed) + 1}")
        while newest(disturbed[-1]) < steps and (sent.total() < kills or time.monotonic() < end):
            name, statuses, first_step = disturb(corpus, disturbed[-1], flags, options, rng, steps)
            sent.update([name] if name else [])
            first_steps += first_step
            what, step = name or "finished before it", newest(disturbed[-1])
            log(f"{sent.total()}: {what}, exit {statuses}, newest step {step}", flush=True)
        run_to_end(corpus, disturbed[-1], flags, options)
        equal &= (digest(disturbed[-1]), losses(disturbed[-1])) == expected
    log(summary(disturbed, sent, first_steps, steps), flush=True)
    log(f"losses and states are {'equal to the last bit' if equal else 'DIFFERENT'}", flush=True)
    return sent, equal


def summary(workdirs, sent, first_steps, steps):
    """Returns a line that says what the signals cost."""
    signals = " and ".join(f"{count} {name}" for name, count in sent.items())
    logged = sum("loss" in line for workdir in workdirs for line in records(workdir))
    spent = collections.Counter()
    for workdir in workdirs:
        spent.update(json.loads((workdir / "goodput.json").read_text())["seconds"])
    redone = logged - steps * len(workdirs)
    first = f"{statistics.median(first_steps):.1f} s" if first_steps else "not seen"
    return (
        f"{signals} over {len(workdirs)} run(s) of {steps} steps: {redone} steps redone, "
        f"{first} from a start to its first step (median), "
        f"{spent['step'] / spent.total():.1%} of the time in steps"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, help="minimum number of signals to send")
    parser.add_argument("--minutes", type=float, default=0.0, help="minimum duration in minutes")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run (loopback)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        (path / "corpus").mkdir()
        _, equal = soak(write_corpus(path / "corpus"), path, **vars(arguments))
    sys.exit(not equal)


if __name__ == "__main__":
    main()
