"""Plans of a run: the train step, compiled for a machine that you do not have.

  __main__.py     the command
  report.py       the plan: whether the step fits, how fast it is, how long the run takes
  compilation.py  compiles the step ahead of time
  hlo.py          reads the compiled program
  hlo_cost.py     computes the FLOPs and bytes of its instructions
  network.py      computes the seconds of its collectives
  roofline.py     predicts the seconds of a step from its schedule
  calibration.py  compares predictions with measured runs
  estimate.py     estimates memory and time by arithmetic
  candidates.py   lists meshes, remat policies and microbatches to try
  tpu_schedule.py compiles a candidate up to its schedule, in seconds
  search.py       searches the fastest candidate that fits
  advice.py       suggests changes that make a plan fit

Rule: allocates no arrays on devices.
"""
