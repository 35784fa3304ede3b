"""A small LLaMA (5,261,568 parameters) that learns Python from Python's own standard library.

  python -m llama_jax.train --config=configs/tiny.py --workdir=runs/tiny

Batch: 8 sequences x 256 tokens = 2,048 tokens a step, 850 steps = 1.7M tokens.
Expect: under 9 minutes on two CPU cores, and a validation loss of about 3.8 nats per token.
Fits, as the compilers of these machines say (tests/reference/plans.py checks it):
  python -m llama_jax.plan --config=configs/tiny.py --topology=v5e:2x2
    0.0 of 15.8 GiB a chip; predicted 0.00 s a step, 347,394 tokens/s/chip,
    MFU 5.6% (6N), 0 days, 0.0 chip hours.
  python -m llama_jax.plan --config=configs/tiny.py --topology=rtx4090:1x1
    0.3 of 21.6 GiB a chip; predicted 0.00 s a step, 601,143 tokens/s/chip,
    MFU 11.5% (6N), 0 days, 0.0 chip hours.
"""

import ml_collections

from llama_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.vocab_size = 4096
    config.model.dim = 256
    config.model.n_layers = 4
    config.model.n_heads = 4
    config.model.n_kv_heads = 4
    config.model.ffn_dim = 688
    config.model.compute_dtype = "float32"  # CPUs multiply bfloat16 slowly
    config.data.validation_fraction = 0.03
    config.optim.peak_lr = 2e-3
    config.optim.warmup_steps = 80
    config.train.steps = 850
    config.train.seq_len = 256
    config.train.global_batch = 8
    config.train.loss_chunk = 256
    config.train.log_every = 10
    config.train.eval_every = 200
    config.train.eval_batches = 20
    config.train.checkpoint_every = 200
    # No trailing space: the tokenizer puts a space at the beginning of the next word.
    config.train.sample_prompt = "def __init__(self"
    return config
