"""Shows prepared data: `python -m llama_jax.data --show=DIR`.

  summary.py  counts, lengths and shares
  rows.py     rows of tokens as text
  plot.py     histograms of document lengths, and shares of sources, as a PNG

Rule: this room never changes the data.
"""
