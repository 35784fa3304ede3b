"""The same command twice, in fresh processes, gives the same bits (row 25)."""

import hashlib
import json

import jax
import pytest

from llama_jax.checkpoint import find_step, load_meta, load_params
from llama_jax.step import jit_step
from tests.helpers import mesh_of, run_command

FLAGS = (
    *("--config=configs/tiny.py", "--config.data.source=synthetic", "--config.model.vocab_size=64"),
    *("--config.model.dim=32", "--config.model.n_layers=2", "--config.model.n_heads=4"),
    *("--config.model.n_kv_heads=4", "--config.model.ffn_dim=48", "--config.train.seq_len=16"),
    *("--config.train.global_batch=16", "--config.train.loss_chunk=8", "--config.train.steps=6"),
    *("--config.optim.warmup_steps=2", "--config.train.log_every=1"),
    *("--config.train.sample_prompt=", "--config.train.grad_accum=2"),
)


def run(workdir, devices):
    """Losses and gradient norms of each step as hexadecimal, and the sha256 of the weights."""
    done = run_command("train", f"--workdir={workdir}", *FLAGS, devices=devices)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["loss"].hex(), line["grad_norm"].hex()) for line in lines if "loss" in line]
    folder = find_step(workdir)
    config = load_meta(folder).config
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        params = load_params(folder, config, jit_step(config, mesh).state_shardings.params)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(params)):
        digest.update(leaf.tobytes())
    return steps, digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_two_runs_are_equal_to_the_last_bit(tmp_path, devices):
    first, second = (run(tmp_path / name, devices) for name in ("first", "second"))
    assert len(first[0]) == 6 and len(set(first[0])) == 6
    assert second == first
