"""LLaMA 13B (13,015,864,320 parameters) on 1.0T tokens, as in arXiv:2302.13971, table 2.

  python -m llama_jax.prepare --config=configs/13b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/13b.py --workdir=gs://BUCKET/llama_13b \\
      --config.data.path=gs://BUCKET/tokens

Data: the paper's seven sources, mixed in the shares of its table 1; `data.source` names each one.
Batch: 2,048 sequences x 2,048 tokens = 4,194,304 tokens a step, 238,419 steps = 1.00T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 194 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Expect: the paper reports 135,168 A100-80GB hours, which is 2,055 tokens/s/GPU.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/13b.py --topology=v5p-256 \\
      --config.model.remat=save:q,k,v,attn_context,attn_out,mlp_gate,mlp_up \\
      --config.train.grad_accum=2
    76.8 of 95.7 GiB a chip; predicted 8.09 s a step, 4,051 tokens/s/chip,
    MFU 68.9% (6N), 22 days, 68,565 chip hours.
  python -m llama_jax.plan --config=configs/13b.py --topology=h100:32x8 --xla_preset=hopper \\
      --config.model.remat=save:q,k,v,attn_context,mlp_gate,mlp_up \\
      --config.train.grad_accum=2
    49.8 of 71.2 GiB a chip; predicted 2.28 s a step, 7,171 tokens/s/chip,
    MFU 56.6% (6N), 6 days, 38,737 chip hours.
"""

import ml_collections

from llama_jax.config import default
from llama_jax.data.mixture import llama_sources


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.dim = 5120
    config.model.n_layers = 40
    config.model.n_heads = 40
    config.model.n_kv_heads = 40
    config.model.ffn_dim = 13824
    config.model.remat = "full"
    config.train.steps = 238_419
    config.data.source = llama_sources("gs://BUCKET/corpus")
    config.data.mixture = "llama"
    return config
