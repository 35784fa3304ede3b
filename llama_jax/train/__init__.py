"""A run.

  __main__.py   the command
  run.py        one run from a config to the last state
  start.py      where it begins: the newest checkpoint, given weights or random ones
  resume.py     whether it may go on here
  by_hand.py    what a notebook does around a step: saves, restores, evaluates, samples
  overview.py   what it says before it begins
  loop.py       evaluate, save, next batch, step, log: the order is a contract
  step.py       one step of the optimiser, as a pure function, and its binding to a mesh
  parts.py      what a researcher exchanges: architecture, loss, optimiser, metrics
  optimizer.py  AdamW, schedule, weight decay; any transformation of optax
  bad_steps.py  which updates are skipped, on the device
  rewind.py     back to an older checkpoint, on the host
  instruments/  measures and watches a run

Rule: the only room where devices, clock, disk and processes meet. `plan` imports step and
optimizer; nothing else imports this room.
"""
