"""Llama 3.1 70B (70,553,706,496 parameters), as in arXiv:2407.21783.

  python -m llama_jax.prepare --config=configs/llama3_1_70b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/llama3_1_70b.py --workdir=gs://BUCKET/llama3_1_70b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 32 sequences x 131,072 tokens = 4,194,304 tokens a step, 190,735 steps = 0.80T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 1,051 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe: the stage that extends the context to 128K, with 0.8T tokens (section 3.4.2 of the paper,
which does it in six steps; this config has one). The peak rate is from table 3, which describes
the whole training. For this stage the paper gives no batch, rate, betas, decay or clipping; the
values here are ours.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/llama3_1_70b.py --topology=v5p-512 \\
      --config.model.remat=save:q,k,v,attn_context --config.mesh.context=8
    77.1 of 95.7 GiB a chip; predicted 78.82 s a step, 208 tokens/s/chip,
    MFU 19.2% (6N), 174 days, 1,069,103 chip hours.
  python -m llama_jax.plan --config=configs/llama3_1_70b.py --topology=h200:64x8 \\
      --xla_preset=hopper --config.mesh.context=16
    62.9 of 126.9 GiB a chip; predicted 55.64 s a step, 147 tokens/s/chip,
    MFU 6.3% (6N), 123 days, 1,509,378 chip hours.
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
    config.model.rope_scaling_factor = 8.0
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.optim.peak_lr = 1.5e-4
    config.train.steps = 190_735
    config.train.seq_len = 131072
    config.train.global_batch = 32
    return config
