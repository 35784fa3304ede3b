"""Raw text to batches.

  __main__.py         the command: shows prepared data
  sources/            files of strangers to documents
  prepare/            documents to token shards
  shards/             the format of token shards
  show/               looks at prepared data
  training_data.py    from a config to opened batches
  vocabulary_size.py  how many ids a trained tokenizer gets, and whether they fit the model
  source.py           the interface of everything that gives batches
  mixture.py          exact shares of several sources
  batches.py          which sequence is in which row of which step
  streaming.py        the same without shards
  prefetch.py         makes batches ahead, in the threads of tf.data
  loader.py           batches to devices

Rule: knows no model and no checkpoint.
"""
