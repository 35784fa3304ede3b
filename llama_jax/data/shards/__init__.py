"""The format of token shards.

  layout.py           the files in a folder of shards: names, manifest, checks
  packing.py          packs documents into rows of one length
  block_checksums.py  checksums of blocks, so that a reader checks only the blocks that it reads
  writer.py           writes shards
  reader.py           reads the shards of a split

Rule: of the sources, it knows only the examples that it writes.
"""
