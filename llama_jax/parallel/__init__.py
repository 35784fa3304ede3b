"""The mesh of devices, the placement of arrays on it, and the processes of a job.

  mesh.py       the mesh of devices
  sharding.py   places each parameter and activation on the mesh, and checks the placement
  cluster.py    joins the processes of a job
  multihost.py  lets processes agree on texts, and fail together

Rule: does not use model code or files.
"""
