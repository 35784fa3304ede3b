"""Descriptions of machines: chips, networks and compiler flags.

  chips.py      data sheets: memory, peak FLOP/s, links
  topology.py   machines that you do not have: names, tori, devices as the compiler describes them
  local_tpu.py  the TPU of this computer, before JAX starts a backend
  xla_flags.py  presets of compiler flags, each flag with its reason and source

Rule: contains figures and names; no arrays, no config.
"""
