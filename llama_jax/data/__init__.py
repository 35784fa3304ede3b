"""Turns raw text into batches.

  __main__.py         the command that shows prepared data
  sources/            reads the documents in files of many formats
  prepare/            turns documents into token shards
  shards/             the format of token shards
  show/               shows prepared data
  training_data.py    opens the batches that a config describes
  vocabulary_size.py  the size of a trained tokenizer, and the check that its ids fit the model
  source.py           the interface of every source of batches
  mixture.py          mixes several sources in exact shares
  batches.py          decides which sequence is in which row of which step
  streaming.py        makes batches from a source without shards
  loader.py           copies batches to the devices

Rule: this room imports no model and no checkpoint code.
"""
