"""Documents to token shards, once; training then only reads.

  job.py                the whole: finds what is done, does the rest
  new_tokenizer.py      the tokenizer that is given, or a new one
  tokenize.py           one part of a source to shards
  workers.py            processes, or Apache Beam, that do the parts
  hold_out.py           a validation split where chance left none
  merge_reports.py      the manifest of a source whose parts are all done
  report.py             what was read and written, in words
  output_folder.py      the folder that is made: locked, begun, cut short, complete

Rule: a part's shards depend on the part and the config only.
"""
