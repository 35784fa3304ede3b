"""Preparation of token shards from documents, done once before training.

  job.py                the whole job: finds what is done, and does the rest
  new_tokenizer.py      the tokenizer of the shards: a given one or a new one
  tokenize.py           turns one part of a source into shards
  workers.py            writes the parts in processes or on Apache Beam
  hold_out.py           holds out the last tokens if hashes choose no document or all of them
  merge_reports.py      the manifest of a source whose parts are all done
  report.py             the report at the end, and the progress display
  output_folder.py      the folder of shards while it is written: its lock, plan and completion

Rule: the shards of a part depend only on the part and the config.
"""
