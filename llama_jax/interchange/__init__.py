"""Reads and writes weights: Hugging Face folders, Meta's pickles, PEFT adapters, our checkpoints.

  formats.py            the interfaces of sources and targets: one array after another
  opening.py            opens the source that FORMAT:DIR names; adapters with their base
  loading.py            loads a source onto a mesh
  transfer.py           writes a source to a target, all or nothing
  hf.py                 Hugging Face folders
  hf_config.py          their config.json
  rope_config.py        the RoPE fields of config.json
  fields.py             reads JSON fields, and names those that are not supported
  safetensors.py        the safetensors file format
  weight_files.py       finds the weights: in one file, or in several with an index
  pickles.py            reads torch pickles safely
  meta.py               Meta's folders
  meta_params.py        their params.json
  peft.py               PEFT adapters
  peft_targets.py       which matrices have adapters
  merged_adapters.py    a base with adapters added to it
  averaged.py           the average of several saved steps
  padded_vocabulary.py  adds rows for the vocabulary
  ckpt.py               our checkpoints
  model_card.py         README.md of an export
  fast_tokenizer.py     a tokenizer.json for a SentencePiece model
  bpe_rules.py          its merge rules

Rule: a format knows only its own names and layout. It is a source or a target of matrices, one
array of one layer at a time, in the shape of our parameter tree, so that a conversion needs memory
for one array, not for the model.
"""
