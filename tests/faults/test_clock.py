"""The clock of the machine jumps by decades while it trains, as docs/reliability.md promises."""

import time

import jax
import numpy as np
import pytest

from llama_jax.train import loop
from llama_jax.train.run import train
from tests.faults.test_disk import CONFIG
from tests.helpers import records, replace, until

pytestmark = pytest.mark.usefixtures("shared_steps")

YEARS_S = 20 * 365 * 86_400


def trained(workdir, monkeypatch, jump):
    """Returns the batches, losses and last state of a run, with a clock jump before each batch."""
    stream, folder = loop.device_batches, workdir / "checkpoints"
    batches = []

    def noted(source, start, *rest):
        for batch in stream(source, start, *rest):
            batches.append(jax.device_get(batch))
            # A save that runs has already written something, so that the clock jumps in the middle
            # of it.
            until(lambda: not list(folder.glob("*.saving*")) or list(folder.glob("*.saving*/*/*")))
            jump(len(batches))
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(loop, "device_batches", noted)
        config = replace(CONFIG, train__save_timeout=120, train__step_timeout=120)
        state = jax.device_get(train(config, workdir))
    losses = [(line["step"], line["loss"]) for line in records(workdir) if "loss" in line]
    return batches, losses, state


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch, capsys):
    """Forwards and backwards by 20 years: the same batches and losses, and no time-out."""
    plain = trained(tmp_path / "plain", monkeypatch, lambda number: None)
    real, offset = time.time, 0

    def jump(number):
        nonlocal offset
        offset = (0, YEARS_S, -YEARS_S)[number % 3]

    monkeypatch.setattr(time, "time", lambda: real() + offset)
    capsys.readouterr()
    jumped = trained(tmp_path / "jumped", monkeypatch, jump)
    said = capsys.readouterr().out
    assert "warning" not in said and "waiting" not in said
    assert len(jumped[0]) == len(jumped[1]) == 12
    jax.tree.map(np.testing.assert_array_equal, jumped, plain)
    names = sorted(path.name for path in (tmp_path / "jumped" / "checkpoints").iterdir())
    assert names == ["10", "12", "8"]
