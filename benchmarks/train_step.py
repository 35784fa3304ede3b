"""Measures the train step alone, on synthetic batches, and prints one line of JSON.

Runs on any backend and needs no TensorFlow. Without a config it measures the shape that
benchmarks/README.md compares peers on: 10.5M parameters, T 256, batch 8, float32.

Example:
  python benchmarks/train_step.py
  python benchmarks/train_step.py --config=configs/7b.py --config.train.global_batch=8 --steps=20
"""

import json
import resource
import statistics
import sys
import time

import jax
import numpy as np
from absl import flags

from llama_jax import cli
from llama_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from llama_jax.mesh import make_mesh
from llama_jax.metrics import peak_flops
from llama_jax.sharding import check_batch
from llama_jax.step import jit_step

PEER_SHAPE = Config(
    model=ModelConfig(
        vocab_size=8192,
        dim=256,
        n_layers=8,
        n_heads=8,
        n_kv_heads=8,
        ffn_dim=688,
        compute_dtype="float32",
    ),
    mesh=MeshConfig(),
    data=DataConfig(source="synthetic"),
    optim=OptimConfig(peak_lr=1e-3, warmup_steps=10),
    train=TrainConfig(steps=1000, seq_len=256, global_batch=8, loss_chunk=256),
)


def peak_memory(device: jax.Device) -> int:
    """Bytes: of the device where it tells, else the largest resident size of this process."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


def measure(config: Config, warmup: int, steps: int) -> dict[str, object]:
    """Compiles, warms up, and times each step until its loss is on the host."""
    mesh = make_mesh(config.mesh, config.dcn)
    train = config.train
    check_batch(train.global_batch, train.seq_len, train.grad_accum, mesh)
    rng = np.random.default_rng(train.seed)
    shape = (train.global_batch, train.seq_len + 1)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    host = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((train.global_batch, train.seq_len), np.float32),
    }
    with jax.set_mesh(mesh):
        compiled = jit_step(config, mesh)
        state = compiled.init(jax.random.key(train.seed))
        batch = jax.device_put(host, compiled.batch_sharding)
        began = time.perf_counter()
        step = compiled.train.lower(state, batch).compile()
        compile_seconds = time.perf_counter() - began
        seconds, losses = [], []
        cpu_began = 0.0
        for index in range(warmup + steps):
            if index == warmup:
                cpu_began = time.process_time()
            began = time.perf_counter()
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
            seconds.append(time.perf_counter() - began)
        cpu_seconds = time.process_time() - cpu_began
    timed = sorted(seconds[warmup:])
    median = statistics.median(timed)
    device = mesh.devices.flat[0]
    peak = peak_flops(device)
    flops = config.model.flops_per_token(train.seq_len) * train.tokens_per_step
    return {
        "device": device.device_kind,
        "devices": mesh.size,
        "parameters": config.model.parameter_count(),
        "tokens_per_step": train.tokens_per_step,
        "tokens_per_second": round(train.tokens_per_step / median, 1),
        "best_tokens_per_second": round(train.tokens_per_step / timed[0], 1),
        "step_seconds_median": round(median, 4),
        "step_seconds_p10": round(timed[len(timed) // 10], 4),
        "step_seconds_p90": round(timed[len(timed) * 9 // 10], 4),
        "cpu_seconds_per_step": round(cpu_seconds / steps, 4),
        "compile_seconds": round(compile_seconds, 2),
        "peak_memory_bytes": peak_memory(device),
        "mfu": None if peak is None else round(flops / median / (peak * mesh.size), 4),
        "peak_flops": peak,
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "jax": jax.__version__,
    }


def main() -> None:
    """The command."""
    config = PEER_SHAPE if _CONFIG.value is None else cli.load_config(_CONFIG)
    print(json.dumps(measure(config, _WARMUP.value, _STEPS.value)))


if __name__ == "__main__":
    _CONFIG = cli.config_flag()
    _STEPS = flags.DEFINE_integer("steps", 30, "Timed steps.", lower_bound=1)
    _WARMUP = flags.DEFINE_integer("warmup", 10, "Steps before, not counted.", lower_bound=0)
    cli.run(main, __doc__)
