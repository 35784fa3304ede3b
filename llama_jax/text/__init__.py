"""Text to token ids and back.

  tokenizer.py          one tokenizer over several formats; training by LLaMA's recipe
  tokenizer_formats.py  SentencePiece models, and what a format must offer
  tokenizer_json.py     Hugging Face's tokenizer.json
  tokenizer_parts.py    pieces of a tokenizer.json
  tiktoken_ranks.py     LLaMA-3's own file of ranks
  tokenizer_files.py    which files are a tokenizer's, and which of several fits a model
  tokenizer_config.py   what the files beside it say: BOS, EOS, special tokens
  saved_tokenizer.py    the tokenizer inside a saved step
  tokenizer_process.py  training in a process of its own, which may be stopped
  probe_texts.py        texts on which two tokenizers are compared
  chat_template.py      conversations as a model expects them
  templates.py          a template by name or from a file; Alpaca, Vicuna, LLaMA-2, LLaMA-3
  template_renderer.py  renders templates of strangers in a process that may be stopped
  jinja_process.py      the other side of it
  answer_ends.py        where an answer ends among the tokens of a conversation
  child_process.py      child processes that talk through pipes

Rule: knows no model, no shards and no checkpoint.
"""
