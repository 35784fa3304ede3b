"""Guanaco: QLoRA on LLaMA-7B (6,738,415,616 parameters), frozen in NF4, on one GPU.

  python -m llama_jax.train --config=configs/guanaco_7b_qlora.py --workdir=runs/guanaco_7b \\
      --config.init_from=hf:llama-7b --config.data.source=openassistant_best_replies_train.jsonl

Batch: 16 sequences x 512 tokens = 8,192 tokens a step, 1,875 steps.
Recipe of arXiv:2305.14314 (appendix B): NF4 with double quantisation, adapters of rank 64 and alpha
16 with dropout 0.1 on all matrices, constant rate 2e-4, beta2 0.999, clipping at 0.3, 16 records a
step. Two differences are ours: packed sequences replace padded records of at most 512 tokens, and
the template is Vicuna's; a Jinja file of three lines gives the paper's "### Human" and
"### Assistant".
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/guanaco_7b_qlora.py --topology=v5e:2x2
    4.0 of 15.8 GiB a chip; predicted 2.44 s a step, 838 tokens/s/chip,
    MFU 11.5% (4N), 1.27 hours, 5.09 chip hours.
  python -m llama_jax.plan --config=configs/guanaco_7b_qlora.py --topology=rtx4090:1x1
    7.9 of 21.6 GiB a chip; predicted 3.08 s a step, 2,662 tokens/s/chip,
    MFU 43.4% (4N), 1.60 hours, 1.6 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.init_from = "hf:llama-7b"
    config.model.remat = "full"
    config.lora.rank = 64
    config.lora.alpha = 16.0
    config.lora.dropout = 0.1
    config.lora.base_dtype = "nf4"
    config.data.source = "openassistant_best_replies_train.jsonl"
    config.data.template = "vicuna"
    config.data.packing = "best_fit"
    config.optim.peak_lr = 2e-4
    config.optim.final_lr_fraction = 1.0
    config.optim.warmup_steps = 0
    config.optim.beta2 = 0.999
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 0.3
    config.train.steps = 1_875
    config.train.seq_len = 512
    config.train.global_batch = 16
    config.train.grad_accum = 4
    config.train.eval_every = 200
    config.train.checkpoint_every = 200
    return config
