"""The model of `tiny` (5,261,568 parameters), fine-tuned to answer questions about signatures.

  python -m llama_jax.train --config=configs/tiny_quiz.py --workdir=runs/quiz \\
      --config.init_from=ckpt:runs/tiny --config.data.source=runs/quiz/questions.json

Batch: 8 sequences x 256 tokens = 2,048 tokens a step, 300 steps = 0.6M tokens.
`make quiz` writes the questions, trains, and prints answers before and after (examples/quiz.py).
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/tiny_quiz.py --topology=v5e:2x2
    0.0 of 15.8 GiB a chip; predicted 0.00 s a step, 346,716 tokens/s/chip,
    MFU 5.6% (6N), 0 days, 0.0 chip hours.
  python -m llama_jax.plan --config=configs/tiny_quiz.py --topology=rtx4090:1x1
    0.3 of 21.6 GiB a chip; predicted 0.00 s a step, 601,113 tokens/s/chip,
    MFU 11.5% (6N), 0 days, 0.0 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.init_from = "ckpt:runs/tiny"
    config.model.vocab_size = 4096
    config.model.dim = 256
    config.model.n_layers = 4
    config.model.n_heads = 4
    config.model.n_kv_heads = 4
    config.model.ffn_dim = 688
    config.model.compute_dtype = "float32"  # CPUs multiply bfloat16 slowly
    config.data.source = "runs/quiz/questions.json"
    config.data.template = "llama2"
    config.data.packing = "best_fit"
    config.data.validation_fraction = 0.03
    config.optim.peak_lr = 5e-4
    config.optim.warmup_steps = 20
    config.train.steps = 300
    config.train.seq_len = 256
    config.train.global_batch = 8
    config.train.loss_chunk = 256
    config.train.log_every = 10
    config.train.eval_every = 100
    config.train.checkpoint_every = 100
    return config
