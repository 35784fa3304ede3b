"""LLaMA-2 13B (13,015,864,320 parameters), as in arXiv:2307.09288.

  python -m llama_jax.prepare --config=configs/llama2_13b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/llama2_13b.py --workdir=gs://BUCKET/llama2_13b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 1,024 sequences x 4,096 tokens = 4,194,304 tokens a step, 476,837 steps = 2.00T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 194 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe, all from the paper (section 2.2, table 1): tokens, batch, peak rate, AdamW with betas 0.9
and 0.95 and eps 1e-5, 2,000 warm-up steps, cosine decay to a tenth of the peak, weight decay 0.1,
clipping at 1.0. The paper does not publish its data mixture.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/llama2_13b.py --topology=v5p-256 \\
      --config.model.remat=save:q,k,v,attn_context,attn_out,mlp_gate,mlp_up \\
      --config.train.grad_accum=2
    76.8 of 95.7 GiB a chip; predicted 8.58 s a step, 3,819 tokens/s/chip,
    MFU 65.0% (6N), 47 days, 145,469 chip hours.
  python -m llama_jax.plan --config=configs/llama2_13b.py --topology=h100:32x8 \\
      --xla_preset=hopper --config.model.remat=save:q,k,v,attn_context,mlp_gate,mlp_up \\
      --config.train.grad_accum=2
    49.8 of 71.2 GiB a chip; predicted 2.45 s a step, 6,695 tokens/s/chip,
    MFU 52.9% (6N), 14 days, 82,981 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.dim = 5120
    config.model.n_layers = 40
    config.model.n_heads = 40
    config.model.n_kv_heads = 40
    config.model.ffn_dim = 13824
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.optim.eps = 1e-5
    config.train.steps = 476_837
    config.train.seq_len = 4096
    config.train.global_batch = 1024
    return config
