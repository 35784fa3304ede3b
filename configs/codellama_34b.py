"""Code Llama 34B (33,743,970,304 parameters), as in arXiv:2308.12950.

  python -m llama_jax.prepare --config=configs/codellama_34b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/codellama_34b.py --workdir=gs://BUCKET/codellama_34b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 256 sequences x 16,384 tokens = 4,194,304 tokens a step, 119,209 steps = 0.50T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 503 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe: the number of tokens is the paper's. The paper continues LLaMA-2 at 4,096 tokens and then
fine-tunes at 16,384; this config has one stage at 16,384. Its batch, peak rate and schedule are
ours.
This size has no infilling tokens: its vocabulary is LLaMA-2's 32,000.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/codellama_34b.py --topology=v5p-512 \\
      --config.model.remat=save:mlp_up,attn_out,q
    75.5 of 95.7 GiB a chip; predicted 15.13 s a step, 1,083 tokens/s/chip,
    MFU 47.8% (6N), 21 days, 128,236 chip hours.
  python -m llama_jax.plan --config=configs/codellama_34b.py --topology=h100:32x8 \\
      --xla_preset=hopper --config.model.remat=save:q,k,v,attn_context
    47.8 of 71.2 GiB a chip; predicted 8.51 s a step, 1,926 tokens/s/chip,
    MFU 39.4% (6N), 12 days, 72,100 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.dim = 8192
    config.model.n_layers = 48
    config.model.n_heads = 64
    config.model.n_kv_heads = 8
    config.model.ffn_dim = 22016
    config.model.rope_theta = 1_000_000.0
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.optim.peak_lr = 1.5e-4
    config.train.steps = 119_209
    config.train.seq_len = 16384
    config.train.global_batch = 256
    return config
