"""Measures the train step alone, on synthetic batches, and prints one line of JSON.

It runs on any backend and needs no TensorFlow. Without a config it measures the shape with which
benchmarks/README.md compares other libraries: 10.5M parameters, T 256, batch 8, float32. All
weights are random, also a frozen base. Rows of a packed config have four documents of equal length.

Example:
  python benchmarks/train_step.py
  python benchmarks/train_step.py --config=configs/7b.py --config.model.n_layers=8 \\
      --config.train.global_batch=8 --xla_preset=hopper --kernels=12
"""

import collections
import hashlib
import json
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from llama_jax.cli import command
from llama_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from llama_jax.hardware import xla_flags
from llama_jax.hardware.chips import peak_flops
from llama_jax.model.cost import flops_per_token, parameter_count
from llama_jax.model.weights import abstract_frozen
from llama_jax.parallel.mesh import make_mesh
from llama_jax.parallel.sharding import check_batch
from llama_jax.train.step import CompiledStep, TrainState, abstract_batch, jit_step

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
    """Returns the peak memory in bytes: the device's, or this process's if that is not known."""
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


def random_batch(config: Config) -> dict[str, np.ndarray]:
    """Makes a random batch with the loader's shapes and dtypes; all tokens have weight 1."""
    train = config.train
    rng = np.random.default_rng(train.seed)
    shape = (train.global_batch, train.seq_len + 1)
    tokens = rng.integers(0, config.model.vocab_size, shape, dtype=np.int32)
    place = np.broadcast_to(np.arange(train.seq_len, dtype=np.int32), tokens[:, 1:].shape)
    length = -(-train.seq_len // 4)
    made = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(place.shape, np.float32),
        "segment_ids": place // length + 1,
        "positions": place % length,
    }
    return {name: made[name] for name in abstract_batch(config)}


def random_state(compiled: CompiledStep, config: Config) -> TrainState:
    """Makes the state of a run's start; a frozen base gets random weights, not those of a file."""
    state = compiled.init(jax.random.key(config.train.seed))
    frozen = abstract_frozen(config)
    if frozen is None:
        return state

    def leaf(key: jax.Array, x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jax.random.normal(key, x.shape, x.dtype) * 0.02
        return jax.random.randint(key, x.shape, 0, 127, jnp.int32).astype(x.dtype)

    def make(key: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(frozen)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(tree, [leaf(*pair) for pair in zip(keys, leaves, strict=True)])

    shardings = compiled.state_shardings.frozen
    return state.replace(frozen=jax.jit(make, out_shardings=shardings)(jax.random.key(1)))


def kernel_seconds(folder: str, steps: int) -> dict[str, float]:
    """Reads a trace: seconds per step of each kind of kernel on the first device, longest first."""
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    total: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:") or not plane.name.endswith(":0"):
            continue
        for line in plane.lines:
            if line.name.startswith(("Stream", "XLA Ops")):
                for event in line.events:
                    total[event.name.rstrip("0123456789._")] += event.duration_ns / 1e9 / steps
    return {name: round(seconds, 6) for name, seconds in total.most_common()}


def measure(config: Config, warmup: int, steps: int, kernels: int = 0) -> dict[str, object]:
    """Compiles, warms up, and times each step until its loss is on the host.

    Args:
      config: config of the training.
      warmup: steps before the timed steps.
      steps: timed steps.
      kernels: number of longest kernels to list, from a trace of three further steps; 0: none.
    """
    mesh = make_mesh(config.mesh, config.dcn)
    train = config.train
    check_batch(train.global_batch, train.seq_len, train.grad_accum, mesh)
    with jax.set_mesh(mesh):
        compiled = jit_step(config, mesh)
        state = random_state(compiled, config)
        batch = jax.device_put(random_batch(config), compiled.batch_sharding)
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
        longest: dict[str, float] = {}
        if kernels:
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    for _ in range(3):
                        state, metrics = step(state, batch)
                    jax.block_until_ready(state)
                longest = dict(list(kernel_seconds(folder, 3).items())[:kernels])
    timed = sorted(seconds[warmup:])
    median = statistics.median(timed)
    device = mesh.devices.flat[0]
    peak = peak_flops(device)
    flops = flops_per_token(config.model, config.lora, train.seq_len) * train.tokens_per_step
    return {
        "device": device.device_kind,
        "devices": mesh.size,
        "parameters": parameter_count(config.model),
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
        "losses_sha256": hashlib.sha256(np.asarray(losses).tobytes()).hexdigest()[:16],
        "jax": jax.__version__,
        **({"kernel_seconds": longest} if kernels else {}),
    }


def main() -> None:
    """Runs the command."""
    config = PEER_SHAPE if _CONFIG.value is None else command.load_config(_CONFIG)
    chosen = xla_flags.use_preset(_XLA_PRESET.value)
    measured = measure(config, _WARMUP.value, _STEPS.value, _KERNELS.value)
    print(json.dumps({**measured, "xla_preset": chosen.preset}))


if __name__ == "__main__":
    _CONFIG = command.config_flag()
    _STEPS = flags.DEFINE_integer("steps", 30, "Timed steps.", lower_bound=1)
    _WARMUP = flags.DEFINE_integer("warmup", 10, "Steps before the timed steps.", lower_bound=0)
    _XLA_PRESET = flags.DEFINE_string("xla_preset", xla_flags.AUTO, xla_flags.HELP)
    _KERNELS = flags.DEFINE_integer(
        "kernels", 0, "Number of an accelerator's longest kernels to list.", lower_bound=0
    )
    command.run(main, __doc__)
