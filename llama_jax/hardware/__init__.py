"""What machines are: chips, networks, and how their compilers are set.

  chips.py      data sheets: memory, peak FLOP/s, links
  topology.py   machines that are not here: names, tori, devices that a compiler describes
  local_tpu.py  which TPU this computer has, before JAX starts a backend
  xla_flags.py  compiler flags as presets, each with its reason and source

Rule: figures and names; no arrays, no config.
"""
