"""Code Llama 70B (68,976,910,336 parameters), as in arXiv:2308.12950.

  python -m llama_jax.prepare --config=configs/codellama_70b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/codellama_70b.py --workdir=gs://BUCKET/codellama_70b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 256 sequences x 16,384 tokens = 4,194,304 tokens a step, 238,419 steps = 1.00T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 1,028 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe: the number of tokens is the paper's. The paper continues LLaMA-2 at 4,096 tokens and then
fine-tunes at 16,384; this config has one stage at 16,384. Its batch, peak rate and schedule are
ours.
The released Python and Instruct variants of 70B have RoPE theta 1e4 and a context of 4,096 tokens.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/codellama_70b.py --topology=v5p-512 \\
      --config.model.remat=save:attn_out,q
    72.2 of 95.7 GiB a chip; predicted 30.00 s a step, 546 tokens/s/chip,
    MFU 49.2% (6N), 83 days, 508,692 chip hours.
  python -m llama_jax.plan --config=configs/codellama_70b.py --topology=h100:32x8 \\
      --xla_preset=hopper --config.model.remat=save:attn_context
    52.2 of 71.2 GiB a chip; predicted 16.73 s a step, 979 tokens/s/chip,
    MFU 41.0% (6N), 46 days, 283,656 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.vocab_size = 32_016
    config.model.dim = 8192
    config.model.n_layers = 80
    config.model.n_heads = 64
    config.model.n_kv_heads = 8
    config.model.ffn_dim = 28672
    config.model.rope_theta = 1_000_000.0
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.optim.peak_lr = 1.5e-4
    config.train.steps = 238_419
    config.train.seq_len = 16384
    config.train.global_batch = 256
    return config
