"""Compares our train step with `transformers` and torch on this machine, and prints the ratio.

Both train the shape of `train_step.py` (float32, AdamW, clipping, two threads) on the same random
batch. They run alternately, each in its own process, so that a busy machine slows both. The script
needs the `parity` extra.

Example:
  python benchmarks/vs_torch.py --rounds=3
"""

import json
import os
import statistics
import subprocess
import sys
import time

from absl import app, flags
from train_step import PEER_SHAPE

_ROUNDS = flags.DEFINE_integer("rounds", 3, "Number of runs of each side.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "Timed steps per round.", lower_bound=1)
_WARMUP = flags.DEFINE_integer("warmup", 8, "Steps before the timed steps.", lower_bound=0)
_THREADS = flags.DEFINE_integer("threads", 2, "CPU threads of each side.", lower_bound=1)
_SIDE = flags.DEFINE_enum("side", None, ["torch"], "Internal: run this side and print its JSON.")


def measure_torch(warmup: int, steps: int, threads: int) -> dict[str, float]:
    """Measures the same training step in transformers, in eager mode with SDPA attention.

    Args:
      warmup: steps before the timed steps.
      steps: timed steps.
      threads: CPU threads.

    Returns:
      `tokens_per_second`, by the median step, and the last `loss`.
    """
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model_config, train, optim = PEER_SHAPE.model, PEER_SHAPE.train, PEER_SHAPE.optim
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=model_config.vocab_size,
            hidden_size=model_config.dim,
            intermediate_size=model_config.ffn_dim,
            num_hidden_layers=model_config.n_layers,
            num_attention_heads=model_config.n_heads,
            num_key_value_heads=model_config.n_kv_heads,
            rms_norm_eps=model_config.norm_eps,
            max_position_embeddings=train.seq_len,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optim.peak_lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    rng = np.random.default_rng(0)
    shape = (train.global_batch, train.seq_len + 1)
    tokens = torch.from_numpy(rng.integers(0, model_config.vocab_size, shape))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    seconds = []
    for _ in range(warmup + steps):
        began = time.perf_counter()
        logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        float(loss.detach())
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[warmup:])
    return {"tokens_per_second": train.tokens_per_step / median, "loss": float(loss.detach())}


def _run(command: list[str]) -> dict[str, float]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(output.stdout.splitlines()[-1])


def main(_: list[str]) -> None:
    """Runs the command."""
    if _SIDE.value == "torch":
        print(json.dumps(measure_torch(_WARMUP.value, _STEPS.value, _THREADS.value)))
        return
    folder = os.path.dirname(os.path.abspath(__file__))
    common = [f"--steps={_STEPS.value}", f"--warmup={_WARMUP.value}"]
    ours = [sys.executable, os.path.join(folder, "train_step.py"), *common]
    if hasattr(os, "sched_setaffinity"):  # XLA:CPU uses one thread per core that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
    theirs = [sys.executable, os.path.abspath(__file__), "--side=torch", *common]
    theirs.append(f"--threads={_THREADS.value}")
    results: dict[str, list[float]] = {"llama_jax": [], "torch": []}
    for number in range(_ROUNDS.value):
        for name, command in (("llama_jax", ours), ("torch", theirs)):
            rate = _run(command)["tokens_per_second"]
            results[name].append(rate)
            print(f"round {number + 1}: {name:9} {rate:8.0f} tokens/s", file=sys.stderr)
    ratios = [a / b for a, b in zip(results["llama_jax"], results["torch"], strict=True)]
    print(
        json.dumps(
            {
                "llama_jax_tokens_per_second": round(statistics.median(results["llama_jax"]), 1),
                "torch_tokens_per_second": round(statistics.median(results["torch"]), 1),
                "ratio_median": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
        )
    )


if __name__ == "__main__":
    app.run(main)
