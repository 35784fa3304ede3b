"""A SentencePiece model as the `tokenizer.json` of Hugging Face's tokenizers library.

transformers 5 would read tokenizer.model by itself, but by rules of its own (it adds no space to a
text that begins with one). Here the rules are written down, and a test compares the ids: as in
`vocabularies.SentencePiece`, a text's own beginning gets a space, and what follows a special token
gets none. (The files that were released beside LLaMA put one there, too.) So a chat template gives
the same ids by either file.
"""

import json
from typing import Any

from llama_jax.data.tokenizer import Tokenizer


def fast_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json` of a SentencePiece BPE by LLaMA's recipe."""
    pieces = [tokenizer.piece(number) for number in range(tokenizer.vocab_size)]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    bos, eos, unk = pieces[tokenizer.bos_id], pieces[tokenizer.eos_id], pieces[0]
    space = "▁"
    contents: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [_added(vocab[piece], piece) for piece in (unk, bos, eos)],
        # Spaces are written first: Metaspace puts none before a text that begins with its own.
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": space},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [_metaspace(" ", "first"), _metaspace(space, "never")],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos), _sequence("A", 0)],
            "pair": [_special(bos), _sequence("A", 0), _special(bos), _sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [vocab[bos]], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": space}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": unk,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": _merges(pieces, vocab),
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": json.dumps(contents, ensure_ascii=False).encode() + b"\n",
        "tokenizer_config.json": json.dumps(config, indent=2).encode() + b"\n",
    }


def _merges(pieces: list[str], vocab: dict[str, int]) -> list[list[str]]:
    """Every way to put a piece together from two others; SentencePiece made early pieces first."""
    return [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]


def _metaspace(letter: str, where: str) -> dict[str, Any]:
    """Writes spaces as `letter`, and one before a text."""
    return {"type": "Metaspace", "replacement": letter, "prepend_scheme": where, "split": False}


def _added(number: int, piece: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": piece, **flags, "special": True}


def _special(piece: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": 0}}


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}
