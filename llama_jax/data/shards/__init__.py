"""The format of token shards.

  layout.py           what a folder of shards holds: names, manifest, checks
  packing.py          documents into rows of one length
  block_checksums.py  checksums of blocks, so that a reader checks only what it reads
  writer.py           writes a shard
  reader.py           reads the shards of a split

Rule: knows no sources but the examples that it writes.
"""
