"""Weights of others: Hugging Face's folders, Meta's pickles, PEFT's adapters, our checkpoints.

  formats.py            what a source gives and a target takes: array after array
  opening.py            FORMAT:DIR to a source; adapters with their base
  loading.py            a source onto a mesh
  transfer.py           a source to a target, all or nothing
  hf.py                 Hugging Face's folders
  hf_config.py          their config.json
  rope_config.py        RoPE in it
  fields.py             reads such JSON, and names what is not supported
  safetensors.py        the file format
  weight_files.py       weights in one file or several, with an index
  pickles.py            pickles of torch, read safely
  meta.py               Meta's folders
  meta_params.py        their params.json
  peft.py               PEFT's adapters
  peft_targets.py       which matrices they are for
  merged_adapters.py    a base with adapters added to it
  padded_vocabulary.py  more rows than the source has
  ckpt.py               our checkpoints
  model_card.py         README.md of an export
  fast_tokenizer.py     a tokenizer.json for a SentencePiece model
  bpe_rules.py          its merges

Rule: a format knows its own names and layout only. Each is a source or a target of matrices, one
array of one layer at a time, in the shape that it has in our parameter tree, so that a conversion
needs memory for one array and not for the model.
"""
