"""LLaMA-2 70B (68,976,648,192 parameters), as in arXiv:2307.09288.

  python -m llama_jax.prepare --config=configs/llama2_70b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/llama2_70b.py --workdir=gs://BUCKET/llama2_70b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 1,024 sequences x 4,096 tokens = 4,194,304 tokens a step, 476,837 steps = 2.00T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 1,028 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe, all from the paper (section 2.2, table 1): tokens, batch, peak rate, AdamW with betas 0.9
and 0.95 and eps 1e-5, 2,000 warm-up steps, cosine decay to a tenth of the peak, weight decay 0.1,
clipping at 1.0. The paper does not publish its data mixture.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/llama2_70b.py --topology=v5p-1024 \\
      --config.model.remat=save:mlp_up,attn_out,q
    70.8 of 95.7 GiB a chip; predicted 11.22 s a step, 730 tokens/s/chip,
    MFU 65.8% (6N), 62 days, 760,805 chip hours.
  python -m llama_jax.plan --config=configs/llama2_70b.py --topology=h100:128x8 \\
      --xla_preset=hopper --config.model.remat=save:q,k,v,attn_context,mlp_up \\
      --config.mesh.data=4
    42.9 of 71.2 GiB a chip; predicted 3.57 s a step, 1,148 tokens/s/chip,
    MFU 48.0% (6N), 20 days, 484,097 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.dim = 8192
    config.model.n_layers = 80
    config.model.n_heads = 64
    config.model.n_kv_heads = 8
    config.model.ffn_dim = 28672
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.optim.peak_lr = 1.5e-4
    config.optim.eps = 1e-5
    config.train.steps = 476_837
    config.train.seq_len = 4096
    config.train.global_batch = 1024
    return config
