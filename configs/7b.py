"""LLaMA 7B (6,738,415,616 parameters) on 1.0T tokens, as in the paper (arXiv:2302.13971, table 2).

  python -m llama_jax.prepare --config=configs/7b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/7b.py --workdir=gs://BUCKET/llama_7b \\
      --config.data.path=gs://BUCKET/tokens

Data: the paper's seven sources, mixed in the shares of its table 1; `data.source` names each one.
Batch: 2,048 sequences x 2,048 tokens = 4,194,304 tokens a step, 238,419 steps = 1.00T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 100 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Expect: the paper reports 82,432 A100-80GB hours, which is 3,370 tokens/s/GPU.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/7b.py --topology=v5p-128 \\
      --config.model.remat=save:q,k,v,attn_context,attn_out,mlp_gate,mlp_up \\
      --config.train.grad_accum=4
    50.4 of 95.7 GiB a chip; predicted 9.00 s a step, 7,280 tokens/s/chip,
    MFU 64.1% (6N), 25 days, 38,156 chip hours.
  python -m llama_jax.plan --config=configs/7b.py --topology=h100:16x8 --xla_preset=hopper \\
      --config.model.remat=save:q,k,v,attn_context,mlp_gate,mlp_up \\
      --config.train.grad_accum=2
    62.8 of 71.2 GiB a chip; predicted 2.44 s a step, 13,416 tokens/s/chip,
    MFU 54.8% (6N), 7 days, 20,705 chip hours.
"""

import ml_collections

from llama_jax.config import default
from llama_jax.data.mixture import llama_sources


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.remat = "full"
    config.train.steps = 238_419
    config.data.source = llama_sources("gs://BUCKET/corpus")
    config.data.mixture = "llama"
    return config
