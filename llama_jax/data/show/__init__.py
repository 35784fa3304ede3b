"""Looks at prepared data: `python -m llama_jax.data --show=DIR`.

  summary.py  counts, lengths, shares
  rows.py     rows of tokens as text
  plot.py     the lengths of documents as a picture

Rule: changes nothing.
"""
