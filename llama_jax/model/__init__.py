"""The LLaMA as pure functions.

  llama.py             norm, attention, SwiGLU, block, decoder; the legend of dimensions
  linear.py            all products of activations and weights, with the output head; gated SiLU
  rope.py              rotary position embeddings, and ways to stretch them to long contexts
  attention.py         the attention function and the table of its backends
  attention_scores.py  types that all backends share; scores and masks
  attention_xla.py     attention by blocks of queries and keys in plain XLA
  attention_splash.py  the splash kernel of TPUs
  attention_cudnn.py   the cuDNN kernel of NVIDIA GPUs
  attention_triton.py  the Pallas-Triton kernel of NVIDIA GPUs
  context_parallel.py  attention over a sequence that is divided over devices
  fusion.py            a barrier that keeps XLA from fusing a gradient into its consumers
  loss.py              cross-entropy in chunks, without all logits at once
  initializers.py      random initial weights with the same bits on every mesh
  weights.py           the parameters that a run trains, and those that it keeps frozen
  lora.py              adapters on a frozen base
  nf4.py               the 4-bit format of QLoRA
  cost.py              counts of parameters and FLOPs, by arithmetic

Rule: no files, no clock; code refers to devices only by the names of dimensions.
"""
