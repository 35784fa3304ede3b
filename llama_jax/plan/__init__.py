"""The same step, compiled for a machine that is not here.

  __main__.py     the command
  report.py       a plan: does it fit, how fast, how long
  compilation.py  compiles the step ahead of time
  hlo.py          reads the compiled program
  hlo_cost.py     FLOPs and bytes of its instructions
  network.py      seconds of its collectives
  roofline.py     seconds of a step, from its schedule
  calibration.py  predictions beside measured runs
  estimate.py     memory and time by arithmetic
  candidates.py   meshes, remat policies and microbatches to try
  tpu_schedule.py a candidate compiled up to its schedule, in seconds
  search.py       the fastest candidate that fits
  advice.py       what would make a plan fit

Rule: allocates nothing.
"""
