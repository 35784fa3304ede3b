"""SIGKILL while a checkpoint is written, as docs/reliability.md promises."""

import random
import time

import jax
import numpy as np
import pytest

from llama_jax.checkpoint.checkpointer import Checkpointer
from tests.helpers import TINY, made_state, random_params, replace, restored_state, start

CONFIG = replace(TINY, model__dim=256, model__ffn_dim=688, model__n_layers=3)


def state_of(step):
    return made_state(CONFIG, random_params(CONFIG.model, seed=step), step)


def kill_inside_a_save(workdir, choose):
    """Kills the child at a random time in a save; returns the last step that it called saved."""
    (process,) = start("tests.faults.saving_child", workdir, devices=1)
    done, seconds, started = 0, [], 0.0
    for line in process.stdout:
        what, step = line.split()
        if what == "saved":
            done = int(step)
            seconds.append(time.monotonic() - started)
        elif what == "saving" and len(seconds) >= 2:  # the first save is slower
            time.sleep(choose.random() * seconds[-1])
            break
        started = time.monotonic()
    process.kill()
    rest, _ = process.communicate()
    later = [int(line.split()[1]) for line in rest.splitlines() if line.startswith("saved")]
    return max([done, *later])


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.long])])
def test_killed_inside_a_save(tmp_path, kills):
    """A saved step is restored bit by bit; a half-saved step is removed and not used."""
    choose, directory = random.Random(kills), tmp_path / "checkpoints"
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: device, state_of(0))
    partial = tries = 0
    while partial < kills:
        tries += 1
        assert tries <= 30 * kills, f"only {partial} of {tries} kills landed inside a save"
        done = kill_inside_a_save(tmp_path, choose)
        partial += any(not path.name.isdigit() for path in directory.iterdir())
        with Checkpointer(tmp_path, CONFIG) as saver:
            step = saver.newest_good_step()
            # The folder may be renamed before the child could report it.
            assert step in (done, done + 1)
            state = restored_state(saver, step, CONFIG, shardings)
        jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
        left = sorted((int(path.name) for path in directory.iterdir()), reverse=True)
        kept = list(range(step, max(0, step - CONFIG.train.keep_checkpoints), -1))
        # Killed between renaming the newest step and removing the oldest one, it leaves one more.
        assert left in (kept, [*kept, kept[-1] - 1])
    print(f"{partial} partial saves of {tries} kills, all recovered")
