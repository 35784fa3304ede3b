"""LLaMA 33B (32,528,943,616 parameters) on 1.4T tokens, as in arXiv:2302.13971, table 2.

  python -m llama_jax.prepare --config=configs/33b.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/33b.py --workdir=gs://BUCKET/llama_33b \\
      --config.data.path=gs://BUCKET/tokens

Data: the paper's seven sources, mixed in the shares of its table 1; `data.source` names each one.
Batch: 2,048 sequences x 2,048 tokens = 4,194,304 tokens a step, 333,786 steps = 1.40T tokens.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 485 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Expect: the paper reports 530,432 A100-80GB hours, which is 733 tokens/s/GPU.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/33b.py --topology=v5p-512 --config.mesh.data=4 \\
      --config.model.remat=save:q,k,v,attn_context,attn_out,mlp_gate,mlp_up \\
      --config.train.grad_accum=2
    82.7 of 95.7 GiB a chip; predicted 10.39 s a step, 1,577 tokens/s/chip,
    MFU 67.0% (6N), 40 days, 246,674 chip hours.
  python -m llama_jax.plan --config=configs/33b.py --topology=h100:128x8 \\
      --xla_preset=hopper --config.model.remat=save:q,k,v,attn_context,mlp_gate,mlp_up \\
      --config.mesh.data=4
    38.1 of 71.2 GiB a chip; predicted 1.60 s a step, 2,558 tokens/s/chip,
    MFU 50.5% (6N), 6 days, 152,034 chip hours.
"""

import ml_collections

from llama_jax.config import default
from llama_jax.data.mixture import llama_sources


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.dim = 6656
    config.model.n_layers = 60
    config.model.n_heads = 52
    config.model.n_kv_heads = 52
    config.model.ffn_dim = 17920
    config.optim.peak_lr = 1.5e-4
    config.model.remat = "full"
    config.train.steps = 333_786
    config.data.source = llama_sources("gs://BUCKET/corpus")
    config.data.mixture = "llama"
    return config
