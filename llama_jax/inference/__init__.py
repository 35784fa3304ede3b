"""Generation and scoring with a loaded model.

  loaded_model.py  a model from a checkpoint, on its own mesh
  decode.py        decoding of tokens with a KV cache
  generation.py    continuations of prompts as text, whole or as a stream
  chat.py          a checkpoint's chat template, and conversations in the terminal
  prompts.py       prompts and conversations read from files
  logprobs.py      log probabilities of given tokens
  perplexity.py    perplexity and bits per byte of documents
  harness.py       the adapter for lm-evaluation-harness

Rule: this room does not import the optimiser or the training loop.
"""
