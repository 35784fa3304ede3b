"""Measurement and supervision of a run.

  metrics.py          speed, and the log of the previous step
  writers.py          console, metrics.jsonl, TensorBoard; add writers for trackers here
  goodput.py          the time that a run spends in each phase
  profiler.py         traces of chosen steps
  signals.py          stopping a run on SIGTERM or Ctrl-C
  watchdog.py         a thread that ends a run that hangs

Rule: the device never waits for an instrument.
"""
