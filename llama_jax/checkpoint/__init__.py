"""Saved steps.

  __main__.py      the command: verifies them
  saved_step.py    what a step's folder holds; finding and reading one
  checkpointer.py  the checkpoints of a run: newest undamaged step, restore, save, wait
  saving.py        one save in the background
  events.py        reports what happens to checkpoints
  retention.py     which steps stay
  manifest.py      size and sha256 of every file
  fingerprint.py   a checksum of arrays that is the same on every mesh

Rule: saves named trees; knows no state of training and no model.
"""
