"""Llama 3.1 8B (8,030,261,248 parameters), as in arXiv:2407.21783.

  python -m llama_jax.prepare --config=configs/llama3_1_8b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/llama3_1_8b.py --workdir=gs://BUCKET/llama3_1_8b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 32 sequences x 131,072 tokens = 4,194,304 tokens a step, 190,735 steps = 0.80T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 120 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe: the stage that extends the context to 128K, with 0.8T tokens (section 3.4.2 of the paper,
which does it in six steps; this config has one). The peak rate is from table 3, which describes
the whole training. For this stage the paper gives no batch, rate, betas, decay or clipping; the
values here are ours.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/llama3_1_8b.py --topology=v5p-128 \\
      --config.model.remat=save:q,k,v,attn_context --config.mesh.context=2
    70.7 of 95.7 GiB a chip; predicted 55.38 s a step, 1,183 tokens/s/chip,
    MFU 12.4% (6N), 122 days, 187,781 chip hours.
  python -m llama_jax.plan --config=configs/llama3_1_8b.py --topology=h200:4x8 \\
      --xla_preset=hopper --config.model.remat=save:attn_context
    89.3 of 126.9 GiB a chip; predicted 64.29 s a step, 2,039 tokens/s/chip,
    MFU 9.9% (6N), 142 days, 108,994 chip hours.
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
    config.model.rope_scaling_factor = 8.0
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.train.steps = 190_735
    config.train.seq_len = 131072
    config.train.global_batch = 32
    return config
