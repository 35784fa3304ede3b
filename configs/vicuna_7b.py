"""Vicuna: LLaMA-7B (6,738,415,616 parameters), all weights fine-tuned on conversations.

  python -m llama_jax.train --config=configs/vicuna_7b.py --workdir=runs/vicuna_7b \\
      --config.init_from=hf:llama-7b --config.data.source=conversations.json

Batch: 80 sequences x 2,048 tokens = 163,840 tokens a step, 1,640 steps.
Recipe of github.com/lm-sys/FastChat: 3 epochs of 70,000 conversations, 128 a step, peak rate 2e-5,
warm-up over 3% and cosine to 0, no decay; AdamW with betas 0.9 and 0.999, clipping at 1.0. One
difference is ours: 80 packed sequences replace 128 padded conversations, assuming 1,280 tokens a
conversation. Compare this with the report of `prepare` on your data and with the epochs in the log.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/vicuna_7b.py --topology=v5p-16
    23.2 of 95.7 GiB a chip; predicted 5.35 s a step, 3,827 tokens/s/chip,
    MFU 33.7% (6N), 2.44 hours, 19.5 chip hours.
  python -m llama_jax.plan --config=configs/vicuna_7b.py --topology=h100:1x8 \\
      --config.train.grad_accum=2
    21.4 of 71.2 GiB a chip; predicted 1.77 s a step, 11,560 tokens/s/chip,
    MFU 47.3% (6N), 0.81 hours, 6.46 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.init_from = "hf:llama-7b"
    config.model.remat = "full"
    config.data.source = "conversations.json"
    config.data.template = "vicuna"
    config.data.packing = "best_fit"
    config.optim.peak_lr = 2e-5
    config.optim.final_lr_fraction = 0.0
    config.optim.warmup_steps = 49
    config.optim.beta2 = 0.999
    config.optim.weight_decay = 0.0
    config.train.steps = 1_640
    config.train.seq_len = 2048
    config.train.global_batch = 80
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    return config
