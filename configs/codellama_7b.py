"""Code Llama 7B (6,738,546,688 parameters), as in arXiv:2308.12950.

  python -m llama_jax.prepare --config=configs/codellama_7b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/codellama_7b.py --workdir=gs://BUCKET/codellama_7b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 256 sequences x 16,384 tokens = 4,194,304 tokens a step, 119,209 steps = 0.50T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 100 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe: the number of tokens is the paper's. The paper continues LLaMA-2 at 4,096 tokens and then
fine-tunes at 16,384; this config has one stage at 16,384. Its batch, peak rate and schedule are
ours.
The vocabulary has 16 more ids than LLaMA-2: the infilling tokens (prefix, middle, suffix, end).
The Python variant of 7B has the 32,000 ids of LLaMA-2: --config.model.vocab_size=32_000.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/codellama_7b.py --topology=v5p-128 \\
      --config.model.remat=save:q,k,v,attn_context,attn_out,mlp_gate,mlp_up \\
      --config.train.grad_accum=4
    50.4 of 95.7 GiB a chip; predicted 14.01 s a step, 4,679 tokens/s/chip,
    MFU 41.2% (6N), 19 days, 29,684 chip hours.
  python -m llama_jax.plan --config=configs/codellama_7b.py --topology=h100:16x8 \\
      --xla_preset=hopper --config.model.remat=save:q,k,v,attn_context,mlp_gate,mlp_up \\
      --config.train.grad_accum=2
    66.8 of 71.2 GiB a chip; predicted 3.91 s a step, 8,389 tokens/s/chip,
    MFU 34.3% (6N), 5 days, 16,557 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.vocab_size = 32_016
    config.model.rope_theta = 1_000_000.0
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.train.steps = 119_209
    config.train.seq_len = 16384
    config.train.global_batch = 256
    return config
