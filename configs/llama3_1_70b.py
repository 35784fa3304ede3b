"""Llama 3.1 70B (70,553,706,496 parameters), as in arXiv:2407.21783.

  python -m llama_jax.prepare --config=configs/llama3_1_70b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/llama3_1_70b.py --workdir=gs://BUCKET/llama3_1_70b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 32 sequences x 131,072 tokens = 4,194,304 tokens a step, 190,735 steps = 0.80T tokens.
Memory: weights, gradients and two moments in float32 are 16 bytes a parameter, 1,051 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations come on top.
Recipe: the stage that stretches the context to 128K, with 0.8T tokens (section 3.4.2 of the paper,
which does so in six steps; here it is one). The peak rate is that of its table 3, which is of the
whole training. Not published for this stage, and ours: batch, rate, betas, decay, clipping.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """The config."""
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
