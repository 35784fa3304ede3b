"""The same command in two fresh processes gives the same bits, as docs/reliability.md promises."""

import pytest

from tests.faults.soak import digest
from tests.helpers import records, run_command

FLAGS = (
    *("--config=configs/tiny.py", "--config.data.source=synthetic", "--config.model.vocab_size=64"),
    *("--config.model.dim=32", "--config.model.n_layers=2", "--config.model.n_heads=4"),
    *("--config.model.n_kv_heads=4", "--config.model.ffn_dim=48", "--config.train.seq_len=16"),
    *("--config.train.global_batch=16", "--config.train.loss_chunk=8", "--config.train.steps=6"),
    *("--config.optim.warmup_steps=2", "--config.train.log_every=1"),
    *("--config.train.sample_prompt=", "--config.train.grad_accum=2"),
)


def run(workdir, devices):
    """Returns hexadecimal losses and gradient norms by step, and the sha256 of the last state."""
    done = run_command("train", f"--workdir={workdir}", *FLAGS, devices=devices, fresh=True)
    assert done.returncode == 0, done.stderr
    lines = records(workdir)
    steps = [(line["loss"].hex(), line["grad_norm"].hex()) for line in lines if "loss" in line]
    return steps, digest(workdir)


@pytest.mark.slow  # it starts four interpreters
@pytest.mark.parametrize("devices", [1, 8])
def test_two_runs_are_equal_to_the_last_bit(tmp_path, devices):
    first, second = (run(tmp_path / name, devices) for name in ("first", "second"))
    assert len(first[0]) == 6 and len(set(first[0])) == 6
    assert second == first
