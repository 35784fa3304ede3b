"""Training runs.

  __main__.py   the command
  run.py        one run, from its config to its last state
  start.py      the first state: the newest checkpoint, given weights or random ones
  origin.py     what a run goes on from: its own steps, a step of another run, or weights
  resume.py     checks that a run may continue in a work directory
  changes.py    which fields may change in a run, and how a change is recorded
  by_hand.py    functions for notebooks: save, restore, evaluate and sample a state
  overview.py   the text that a run prints before it begins
  loop.py       evaluate, save, next batch, step, log: the order is a contract
  step.py       one step of the optimiser, as a pure function, and its binding to a mesh
  stage_steps.py  the compiled step of each stage of a run
  parts.py      the exchangeable parts: architecture, loss, optimiser, metrics
  optimizer.py  AdamW and its weight decay; any optax transformation
  schedule.py   the learning rate of each step
  bad_steps.py  decides on the device which updates are skipped
  rewind.py     goes back to an older checkpoint, on the host
  instruments/  measurement and supervision of a run

Rule: only this room uses devices, clock, disk and processes together. `plan` imports step and
optimizer; nothing else imports this room.
"""
