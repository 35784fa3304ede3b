"""Code Llama 13B (13,016,028,160 parameters), as in arXiv:2308.12950.

  python -m llama_jax.prepare --config=configs/codellama_13b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/codellama_13b.py --workdir=gs://BUCKET/codellama_13b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 256 sequences x 16,384 tokens = 4,194,304 tokens a step, 119,209 steps = 0.50T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 194 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe: the number of tokens is the paper's. The paper continues LLaMA-2 at 4,096 tokens and then
fine-tunes at 16,384; this config has one stage at 16,384. Its batch, peak rate and schedule are
ours.
The vocabulary has 16 more ids than LLaMA-2: the infilling tokens (prefix, middle, suffix, end).
The Python variant of 13B has the 32,000 ids of LLaMA-2: --config.model.vocab_size=32_000.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/codellama_13b.py --topology=v5p-256 \\
      --config.model.remat=save:q,k,v,attn_context,attn_out,mlp_gate,mlp_up \\
      --config.train.grad_accum=2
    77.0 of 95.7 GiB a chip; predicted 12.00 s a step, 2,730 tokens/s/chip,
    MFU 46.4% (6N), 17 days, 50,876 chip hours.
  python -m llama_jax.plan --config=configs/codellama_13b.py --topology=h100:32x8 \\
      --xla_preset=hopper --config.model.remat=save:q,k,v,attn_context
    36.4 of 71.2 GiB a chip; predicted 3.64 s a step, 4,506 tokens/s/chip,
    MFU 35.6% (6N), 5 days, 30,824 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.vocab_size = 32_016
    config.model.dim = 5120
    config.model.n_layers = 40
    config.model.n_heads = 40
    config.model.n_kv_heads = 40
    config.model.ffn_dim = 13824
    config.model.rope_theta = 1_000_000.0
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.train.steps = 119_209
    config.train.seq_len = 16384
    config.train.global_batch = 256
    return config
