"""LLaMA-2 7B (6,738,415,616 parameters), as in arXiv:2307.09288.

  python -m llama_jax.prepare --config=configs/llama2_7b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/llama2_7b.py --workdir=gs://BUCKET/llama2_7b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 1,024 sequences x 4,096 tokens = 4,194,304 tokens a step, 476,837 steps = 2.00T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 100 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe, all from the paper (section 2.2, table 1): tokens, batch, peak rate, AdamW with betas 0.9
and 0.95 and eps 1e-5, 2,000 warm-up steps, cosine decay to a tenth of the peak, weight decay 0.1,
clipping at 1.0. The paper does not publish its data mixture.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/llama2_7b.py --topology=v5p-128 \\
      --config.model.remat=save:q,k,v,attn_context,attn_out,mlp_gate,mlp_up \\
      --config.train.grad_accum=4
    50.5 of 95.7 GiB a chip; predicted 9.87 s a step, 6,642 tokens/s/chip,
    MFU 58.5% (6N), 54 days, 83,645 chip hours.
  python -m llama_jax.plan --config=configs/llama2_7b.py --topology=h100:16x8 \\
      --xla_preset=hopper --config.model.remat=save:q,k,v,attn_context,mlp_gate,mlp_up \\
      --config.train.grad_accum=2
    62.8 of 71.2 GiB a chip; predicted 2.65 s a step, 12,363 tokens/s/chip,
    MFU 50.5% (6N), 15 days, 44,936 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.optim.eps = 1e-5
    config.train.steps = 476_837
    config.train.seq_len = 4096
    config.train.global_batch = 1024
    return config
