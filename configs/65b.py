"""LLaMA 65B (65,285,660,672 parameters) on 1.4T tokens, as in arXiv:2302.13971, table 2.

  python -m llama_jax.prepare --config=configs/65b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/65b.py --workdir=gs://BUCKET/llama_65b \\
      --config.data.path=gs://BUCKET/tokens

Data: the paper's seven sources, mixed in the shares of its table 1; `data.source` names each one.
Batch: 2,048 sequences x 2,048 tokens = 4,194,304 tokens a step, 333,786 steps = 1.40T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 973 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Expect: the paper reports 1,022,362 A100-80GB hours, which is 380 tokens/s/GPU.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/65b.py --topology=v5p-1024 \\
      --config.model.remat=save:mlp_gate,mlp_up,attn_out,q
    88.8 of 95.7 GiB a chip; predicted 9.93 s a step, 825 tokens/s/chip,
    MFU 70.4% (6N), 38 days, 471,378 chip hours.
  python -m llama_jax.plan --config=configs/65b.py --topology=v4-2048 \\
      --config.model.remat=save:mlp_up
    22.6 of 30.8 GiB a chip; predicted 9.69 s a step, 423 tokens/s/chip,
    MFU 60.2% (6N), 37 days, 919,855 chip hours.
  python -m llama_jax.plan --config=configs/65b.py --topology=a100-80g:256x8 \\
      --xla_preset=ampere --config.model.remat=save:q,k,v,attn_context,mlp_gate,mlp_up \\
      --config.mesh.data=8
    34.8 of 71.3 GiB a chip; predicted 4.52 s a step, 453 tokens/s/chip,
    MFU 56.9% (6N), 18 days, 858,783 chip hours.
"""

import ml_collections

from llama_jax.config import default
from llama_jax.data.mixture import llama_sources


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.dim = 8192
    config.model.n_layers = 80
    config.model.n_heads = 64
    config.model.n_kv_heads = 64
    config.model.ffn_dim = 22016
    config.model.norm_eps = 1e-5  # as released; the smaller sizes have 1e-6
    config.optim.peak_lr = 1.5e-4
    config.model.remat = "full"
    config.train.steps = 333_786
    config.data.source = llama_sources("gs://BUCKET/corpus")
    config.data.mixture = "llama"
    return config
