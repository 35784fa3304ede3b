"""Llama 3 8B (8,030,261,248 parameters), as in arXiv:2407.21783.

  python -m llama_jax.prepare --config=configs/llama3_8b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/llama3_8b.py --workdir=gs://BUCKET/llama3_8b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 512 sequences x 8,192 tokens = 4,194,304 tokens a step, 3,576,279 steps = 15.00T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 120 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe: the peak rate is from the paper's table 3; 15T tokens is its rounded number. The paper does
not give batch, warm-up, final rate, betas, decay and clipping for this size; the values here are
LLaMA's. For 405B it reports 8,000 warm-up steps, a cosine to 1% of the peak, and a batch that grows
from 4M to 16M tokens. It describes its data mixture by categories only.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/llama3_8b.py --topology=v5p-128 \\
      --config.model.remat=save:q,k,v,attn_context,attn_out,mlp_gate,mlp_up \\
      --config.train.grad_accum=4
    53.5 of 95.7 GiB a chip; predicted 11.95 s a step, 5,486 tokens/s/chip,
    MFU 57.6% (6N), 494 days, 759,550 chip hours.
  python -m llama_jax.plan --config=configs/llama3_8b.py --topology=h100:16x8 \\
      --xla_preset=hopper --config.model.remat=save:q,k,v,attn_context,mlp_gate,mlp_up \\
      --config.train.grad_accum=2
    62.2 of 71.2 GiB a chip; predicted 3.35 s a step, 9,775 tokens/s/chip,
    MFU 47.6% (6N), 139 days, 426,276 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.vocab_size = 128_256
    config.model.n_kv_heads = 8
    config.model.ffn_dim = 14336
    config.model.rope_theta = 500_000.0
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.train.steps = 3_576_279
    config.train.seq_len = 8192
    config.train.global_batch = 512
    return config
