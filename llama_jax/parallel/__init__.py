"""Which devices, which hosts, and where arrays lie.

  mesh.py       the mesh of devices
  sharding.py   the table of where each parameter and activation lies, and its checks
  cluster.py    joins the processes of a job
  multihost.py  what processes agree on, and how they fail together

Rule: knows no model code and no files.
"""
