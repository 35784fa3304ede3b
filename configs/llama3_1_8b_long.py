"""Llama 3.1 8B (8,030,261,248 parameters), from random weights to a context of 131,072 tokens.

  python -m llama_jax.prepare --config=configs/llama3_1_8b_long.py --output=gs://BUCKET/tokens
  python -m llama_jax.train --config=configs/llama3_1_8b_long.py \\
      --workdir=gs://BUCKET/llama3_1_8b_long --config.data.path=gs://BUCKET/tokens

Batch: 4,194,304 tokens a step in all stages, 3,767,014 steps = 15.80T tokens: 15T tokens in
sequences of 8,192, then 0.2T tokens each in sequences of 16,384, 32,768, 65,536 and 131,072.
Memory: weights, gradients and two moments in float32 take 16 bytes a parameter, 120 GiB in all,
divided over mesh.fsdp x mesh.context x mesh.tensor; activations need further memory.
Recipe: arXiv:2407.21783. It trains on about 15T tokens at a context of 8K (section 3.4.1), then
extends the context from 8K to 128K in six stages, on about 0.8T tokens (section 3.4.2). The lengths
and tokens of these stages are not published: the four doublings here are ours, chosen so that the
tokens of a step do not change. The peak rate is from table 3. RoPE is stretched (factor 8) from the
first long stage on, as in the released model; when the authors began to stretch it is not
published. Batch, warm-up, the one cosine over all steps, betas, decay and clipping are ours.
The config has the values of the last stage, which are those of the released model and of
configs/llama3_1_8b.py; so its plans on v5p-128 and h200:4x8 are those of this config, too.
"""

import ml_collections

from llama_jax.config import default

# In the first stages a batch has more sequences. The smaller chunks of the loss keep the number of
# positions whose logits are in memory (global_batch * loss_chunk) at 65,536 or less.
STAGES = (
    "until 15T tokens: train.seq_len=8192 train.global_batch=512 train.loss_chunk=128 "
    "model.rope_scaling_factor=1; "
    "until 15.2T tokens: train.seq_len=16384 train.global_batch=256 train.loss_chunk=256; "
    "until 15.4T tokens: train.seq_len=32768 train.global_batch=128; "
    "until 15.6T tokens: train.seq_len=65536 train.global_batch=64"
)


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default()
    config.model.vocab_size = 128_256
    config.model.n_kv_heads = 8
    config.model.ffn_dim = 14336
    config.model.rope_theta = 500_000.0
    config.model.rope_scaling_factor = 8.0
    config.model.norm_eps = 1e-5
    config.model.remat = "full"
    config.train.steps = 3_767_014
    config.train.seq_len = 131072
    config.train.global_batch = 32
    config.train.stages = STAGES
    return config
