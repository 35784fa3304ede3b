"""Llama 3 70B (70,553,706,496 parameters), as in arXiv:2407.21783.

  python -m llama_jax.prepare --config=configs/llama3_70b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/llama3_70b.py --workdir=gs://BUCKET/llama3_70b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 512 sequences x 8,192 tokens = 4,194,304 tokens a step, 3,576,279 steps = 15.00T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 1,051 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe: the peak rate is from the paper's table 3; 15T tokens is its rounded number. The paper does
not give batch, warm-up, final rate, betas, decay and clipping for this size; the values here are
LLaMA's. For 405B it reports 8,000 warm-up steps, a cosine to 1% of the peak, and a batch that grows
from 4M to 16M tokens. It describes its data mixture by categories only.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/llama3_70b.py --topology=v5p-1024 \\
      --config.model.remat=save:mlp_up,attn_out,q
    73.3 of 95.7 GiB a chip; predicted 12.57 s a step, 651 tokens/s/chip,
    MFU 60.1% (6N), 520 days, 6,395,572 chip hours.
  python -m llama_jax.plan --config=configs/llama3_70b.py --topology=h100:64x8 \\
      --xla_preset=hopper --config.model.remat=save:q,k,v,attn_context
    46.5 of 71.2 GiB a chip; predicted 7.27 s a step, 1,126 tokens/s/chip,
    MFU 48.2% (6N), 301 days, 3,699,933 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.vocab_size = 128_256
    config.model.dim = 8192
    config.model.n_layers = 80
    config.model.n_heads = 64
    config.model.n_kv_heads = 8
    config.model.ffn_dim = 28672
    config.model.rope_theta = 500_000.0
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.optim.peak_lr = 1.5e-4
    config.train.steps = 3_576_279
    config.train.seq_len = 8192
    config.train.global_batch = 512
    return config
