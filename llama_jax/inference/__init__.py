"""A loaded model writes or scores.

  loaded_model.py  a model from a checkpoint, on a mesh of its own
  decode.py        tokens after tokens, with a cache
  generation.py    text after prompts, as it comes
  chat.py          a checkpoint's chat template, and a conversation in the terminal
  prompts.py       prompts and conversations in files
  logprobs.py      log probabilities of given tokens
  perplexity.py    perplexity and bits per byte of documents
  harness.py       the adapter for lm-evaluation-harness

Rule: knows no optimiser and no run.
"""
