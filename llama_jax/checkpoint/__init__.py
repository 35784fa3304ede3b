"""Checkpoints: saves, restores, verifies and deletes the steps of a run.

  __main__.py      the command that verifies saved steps
  saved_step.py    what the folder of a step holds; finds and reads a step
  checkpointer.py  the checkpoints of a run: newest undamaged step, restore, save, wait
  saving.py        writes one step in the background
  events.py        reports what happens to checkpoints
  retention.py     which steps are kept
  manifest.py      size and sha256 of every file
  fingerprint.py   a checksum of arrays that is the same on every mesh

Rule: this room saves trees by name; it knows neither the training state nor the model.
"""
