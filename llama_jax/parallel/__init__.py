"""Which devices, which hosts, and where arrays lie.

  mesh.py       the mesh of devices
  sharding.py   where each parameter and activation lies, and the checks of it
  cluster.py    joins the processes of a job
  multihost.py  what processes agree on, and how they fail together

Rule: knows no model code and no files.
"""
