"""Readers of the user's data files: they find the files and stream the documents.

  listing.py         the files that a source names
  folder_walk.py     the files below a folder
  file_kind.py       the kind of a file, from its first bytes and its name
  decompression.py   compressed files and UTF-16 files as streams of UTF-8
  part.py            a part of a source, and a tally of what is skipped or changed in it
  documents.py       the parts and the documents of any source
  text_files.py      plain text, cut into documents
  json_files.py      JSON lines and JSON lists
  json_values.py     the values of a long JSON file, one at a time
  parquet.py         Parquet files
  parquet_pages.py   the sizes of the pages of a Parquet column
  parquet_stream.py  the values of a Parquet column, one at a time
  tfds.py            TensorFlow Datasets
  nested_fields.py   fields inside other fields
  conversations.py   records that hold conversations

Rule: nothing here depends on the format of the shards.
"""
