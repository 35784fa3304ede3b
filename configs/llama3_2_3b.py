"""Llama 3.2 3B (3,212,749,824 parameters), as released; arXiv:2407.21783 describes the family.

  python -m llama_jax.prepare --config=configs/llama3_2_3b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/llama3_2_3b.py --workdir=gs://BUCKET/llama3_2_3b \\
      --config.data.path=gs://BUCKET/tokens

Batch: 32 sequences x 131,072 tokens = 4,194,304 tokens a step, 190,735 steps = 0.80T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 48 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe: ours, modelled on the stage of Llama 3.1 that extends the context to 128K, with 0.8T tokens.
No recipe is published: the released weights were pruned from a larger model and distilled.
The embedding table is also the output matrix; RoPE scaling stretches long wavelengths 32 times.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/llama3_2_3b.py --topology=v5p-128 \\
      --config.model.remat=save:q,k,v,attn_context --config.mesh.context=2
    47.7 of 95.7 GiB a chip; predicted 34.06 s a step, 1,924 tokens/s/chip,
    MFU 8.1% (6N), 75 days, 115,494 chip hours.
  python -m llama_jax.plan --config=configs/llama3_2_3b.py --topology=h100:4x8 \\
      --xla_preset=hopper --config.model.remat=save:attn_context
    57.8 of 71.2 GiB a chip; predicted 40.07 s a step, 3,271 tokens/s/chip,
    MFU 6.4% (6N), 88 days, 67,929 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.vocab_size = 128_256
    config.model.dim = 3072
    config.model.n_layers = 28
    config.model.n_heads = 24
    config.model.n_kv_heads = 8
    config.model.ffn_dim = 8192
    config.model.rope_theta = 500_000.0
    config.model.rope_scaling_factor = 32.0
    config.model.norm_eps = 1e-5
    config.model.tied_embeddings = True
    config.model.remat = "full"
    config.train.steps = 190_735
    config.train.seq_len = 131072
    config.train.global_batch = 32
    return config
