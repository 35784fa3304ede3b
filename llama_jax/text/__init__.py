"""Turns text into token ids, and token ids into text.

  tokenizer.py          one tokenizer class for several formats; training by LLaMA's recipe
  tokenizer_formats.py  the interface of a format, and SentencePiece models
  tokenizer_json.py     Hugging Face's tokenizer.json
  tokenizer_parts.py    parts of a tokenizer.json
  tiktoken_ranks.py     LLaMA-3's own file of ranks
  tokenizer_files.py    the files of tokenizers, and the tokenizer of a folder that fits a model
  tokenizer_config.py   reads BOS, EOS and special tokens from the other files of a tokenizer
  saved_tokenizer.py    reads the tokenizer of a saved step
  tokenizer_process.py  trains a tokenizer in its own process, which can be stopped
  probe_texts.py        texts for the comparison of two tokenizers
  chat_template.py      turns conversations into the text and the tokens that a model expects
  templates.py          opens a template by name or from a file; Alpaca, Vicuna, LLaMA-2, LLaMA-3
  template_renderer.py  renders untrusted templates in a process that can be stopped
  jinja_process.py      the process that renders templates
  answer_ends.py        counts the answers without an end token
  child_process.py      starts child processes that communicate through pipes

Rule: this room imports no model, no shards and no checkpoint code.
"""
