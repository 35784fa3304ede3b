"""Files of strangers to documents.

  listing.py         which files a source names
  folder_walk.py     reads folders, each once
  file_kind.py       finds out what a file is, from its first bytes
  decompression.py   gzip, zstandard, xz and bzip2 as streams
  part.py            a part of a source, and the tally of what is met in it
  documents.py       parts and documents of any source
  text_files.py      plain text, cut into documents
  json_files.py      JSON lines and JSON lists
  json_values.py     the values of a long JSON list, one at a time
  parquet.py         Parquet tables
  parquet_pages.py   their pages
  parquet_stream.py  columns that are read page by page
  tfds.py            TensorFlow Datasets
  nested_fields.py   a field inside of a record
  conversations.py   records that are conversations

Rule: knows no shards.
"""
