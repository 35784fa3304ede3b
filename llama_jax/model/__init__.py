"""The LLaMA as pure functions.

  llama.py             norm, attention, SwiGLU, block, decoder; the legend of dimensions
  linear.py            every product of activations and weights, the head's too; gated SiLU
  rope.py              rotary position embeddings, and how they are stretched
  attention.py         one function, and the table of its backends
  attention_scores.py  what backends are given; scores and masks
  attention_xla.py     blocks of queries and keys in plain XLA
  attention_splash.py  the splash kernel of TPUs
  attention_cudnn.py   cuDNN's kernel
  attention_triton.py  a Triton kernel
  context_parallel.py  attention over a sequence that is divided over devices
  fusion.py            a border that keeps XLA from merging a gradient into its consumers
  loss.py              cross-entropy in chunks, without all logits at once
  initializers.py      random numbers, the same bits on every mesh
  weights.py           what a run trains, and what it keeps frozen
  lora.py              adapters above a frozen base
  nf4.py               the 4-bit format of QLoRA
  cost.py              parameters and FLOPs by arithmetic

Rule: no files, no clock; devices only by the names of dimensions.
"""
