"""Guanaco: QLoRA on LLaMA-65B (65,285,660,672 parameters), frozen in NF4, on one GPU of 48 GB.

  python -m llama_jax.train --config=configs/guanaco_65b_qlora.py --workdir=runs/guanaco_65b \\
      --config.init_from=hf:llama-65b --config.data.source=openassistant.jsonl

Batch: 16 sequences x 512 tokens = 8,192 tokens a step, 1,875 steps.
Recipe of arXiv:2305.14314 (appendix B): as guanaco_7b_qlora.py, but with rate 1e-4 and
dropout 0.05. One difference is ours: rank 16 instead of 64. Adapters, gradients and moments are
float32 on the device and take 12 GiB at rank 64; the paper pages the moments to the host. Alpha
stays 16.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/guanaco_65b_qlora.py --topology=v5e:4x4 \\
      --config.train.grad_accum=1
    6.7 of 15.8 GiB a chip; predicted 12.32 s a step, 42 tokens/s/chip,
    MFU 5.5% (4N), 6.44 hours, 103 chip hours.
  python -m llama_jax.plan --config=configs/guanaco_65b_qlora.py --topology=l40s:1x1
    37.8 of 40.5 GiB a chip; predicted 32.95 s a step, 249 tokens/s/chip,
    MFU 17.9% (4N), 17.16 hours, 17.16 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.init_from = "hf:llama-65b"
    config.model.dim = 8192
    config.model.n_layers = 80
    config.model.n_heads = 64
    config.model.n_kv_heads = 64
    config.model.ffn_dim = 22_016
    config.model.remat = "full"
    config.lora.rank = 16
    config.lora.alpha = 16.0
    config.lora.dropout = 0.05
    config.lora.base_dtype = "nf4"
    config.data.source = "openassistant.jsonl"
    config.data.template = "vicuna"
    config.data.packing = "best_fit"
    config.optim.peak_lr = 1e-4
    config.optim.final_lr_fraction = 1.0
    config.optim.warmup_steps = 0
    config.optim.beta2 = 0.999
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 0.3
    config.train.steps = 1_875
    config.train.seq_len = 512
    config.train.global_batch = 16
    config.train.grad_accum = 16
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    return config
