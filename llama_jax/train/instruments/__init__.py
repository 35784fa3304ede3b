"""Measures and watches a run.

  metrics.py          speed, and the log of the step before
  writers.py          console, metrics.jsonl, TensorBoard; the place for a tracker
  goodput.py          where the time of a run goes
  profiler.py         traces of chosen steps
  compile_counter.py  counts compiled programs
  signals.py          SIGTERM and Ctrl-C
  watchdog.py         ends a run that hangs

Rule: the device never waits for one of them.
"""
