"""Alpaca: LLaMA-7B (6,738,415,616 parameters), all weights fine-tuned on instructions.

  python -m llama_jax.train --config=configs/alpaca_7b.py --workdir=runs/alpaca_7b \\
      --config.init_from=hf:llama-7b --config.data.source=alpaca_data.json

Batch: 40 sequences x 512 tokens = 20,480 tokens a step, 1,218 steps.
Recipe of github.com/tatsu-lab/stanford_alpaca: 3 epochs of 52,002 records, 128 a step, AdamW with
betas 0.9 and 0.999 and no decay, peak rate 2e-5, warm-up over 3% and cosine to 0, clipping at 1.0.
One difference is ours: 40 packed sequences replace 128 padded records, assuming 160 tokens a
record. Compare this with the report of `prepare` on your data and with the epochs in the log.
Training all weights takes 8 GPUs of 80 GB or less; training adapters (docs/lora.md) takes one.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/alpaca_7b.py --topology=v5p-16
    15.5 of 95.7 GiB a chip; predicted 0.76 s a step, 3,390 tokens/s/chip,
    MFU 29.9% (6N), 0.26 hours, 2.04 chip hours.
  python -m llama_jax.plan --config=configs/alpaca_7b.py --topology=h100:1x8
    15.2 of 71.2 GiB a chip; predicted 0.24 s a step, 10,610 tokens/s/chip,
    MFU 43.4% (6N), 0.08 hours, 0.65 chip hours.
  python -m llama_jax.plan --config=configs/alpaca_7b.py --topology=a100-80g:1x8
    14.8 of 71.3 GiB a chip; predicted 0.66 s a step, 3,888 tokens/s/chip,
    MFU 50.4% (6N), 0.22 hours, 1.78 chip hours.
  python -m llama_jax.plan --config=configs/alpaca_7b.py --topology=rtx4090:1x1 \\
      --config.lora.rank=16 --config.train.grad_accum=5
    15.1 of 21.6 GiB a chip; predicted 7.32 s a step, 2,797 tokens/s/chip,
    MFU 45.6% (4N), 2.48 hours, 2.48 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.init_from = "hf:llama-7b"
    config.model.remat = "full"
    config.data.source = "alpaca_data.json"
    config.data.template = "alpaca"
    config.data.packing = "best_fit"
    config.optim.peak_lr = 2e-5
    config.optim.final_lr_fraction = 0.0
    config.optim.warmup_steps = 36
    config.optim.beta2 = 0.999
    config.optim.weight_decay = 0.0
    config.train.steps = 1_218
    config.train.seq_len = 512
    config.train.global_batch = 40
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    return config
