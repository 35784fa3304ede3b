"""Llama 3's own tokenizer file (tiktoken's ranks), converted to a `tokenizer.json`.

Each line holds the bytes of a token in base64, and its rank, which is its id. The file lacks the
rule that splits a text into words, and the 256 special tokens, whose ids follow the ranks. Both are
in the code that was released with it (https://github.com/meta-llama/llama3, `tokenizer.py`).

tiktoken merges the two neighbours whose merged token has the lowest rank. A list of merges is
equivalent if it contains every way to make a token from two others, sorted by rank of the token.
"""

import base64
import functools
import json
import re
from typing import Any

from llama_jax.errors import UserError
from llama_jax.text.tokenizer_formats import byte_of_letter
from llama_jax.text.tokenizer_parts import beginning, special_token

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_COUNT = 256  # special tokens
_LINE = re.compile(rb"\s*[!-~]+[ \t]+[0-9]+[ \t\r]*(\n|$)")


def _with_reserved(names: dict[int, str]) -> tuple[str, ...]:
    """Returns the names of all special tokens; those not in `names` are numbered."""
    found, number = [], 0
    for place in range(_COUNT):
        if place in names:
            found.append(f"<|{names[place]}|>")
        else:
            found.append(f"<|reserved_special_token_{number}|>")
            number += 1
    return tuple(found)


_FIRST = {
    0: "begin_of_text",
    1: "end_of_text",
    6: "start_header_id",
    7: "end_header_id",
    9: "eot_id",
}
LLAMA3 = _with_reserved(_FIRST)
# Llama 3.1 to 3.3 have the same file, but their tokenizer.json names three more tokens.
LLAMA31 = _with_reserved({**_FIRST, 4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"})


def is_tiktoken(content: bytes) -> bool:
    """Returns whether a tokenizer.model has Llama 3's format (lines of base64 and rank).

    Otherwise it is a SentencePiece model.
    """
    return _LINE.match(content[:1000].removeprefix(b"\xef\xbb\xbf")) is not None


def read_ranks(content: bytes, name: str) -> list[bytes]:
    """Returns the tokens, in the order of their ranks.

    Raises:
      UserError: a line is not base64 and a number, the ranks are not consecutive from 0, a token
        occurs twice, or a token for one of the 256 bytes is missing, so that some texts have no
        encoding.
    """
    found: dict[bytes, int] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            word, rank = line.split()
            token = base64.b64decode(word, validate=True)
            if not rank.isdigit() or not token:
                raise ValueError
        except ValueError as error:  # binascii.Error is one
            raise UserError(
                f"{name}: line {number} is not a token in base64 and its rank"
            ) from error
        if token in found:
            raise UserError(f"{name}: line {number} repeats an earlier token")
        found[token] = int(rank)
    if sorted(found.values()) != list(range(len(found))):
        raise UserError(
            f"{name}: the ranks of its {len(found):,} tokens are not consecutive from 0"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in found]
    if missing:
        raise UserError(f"{name} has no token for the byte 0x{missing[0]:02X}; is it truncated?")
    return sorted(found, key=found.__getitem__)


@functools.lru_cache(maxsize=4)
def tokenizer_json(content: bytes, name: str, special: tuple[str, ...] = LLAMA31) -> bytes:
    """Converts the file to a `tokenizer.json`, which begins each text with BOS.

    Args:
      content: contents of the file.
      name: name of the file in errors.
      special: names of the special tokens, whose ids follow the ranks: `LLAMA31` or `LLAMA3`.

    Raises:
      UserError: see `read_ranks`.
    """
    tokens = read_ranks(content, name)
    letters = {byte: letter for letter, byte in byte_of_letter().items()}
    pieces = ["".join(letters[byte] for byte in token) for token in tokens]
    vocab = {piece: rank for rank, piece in enumerate(pieces)}
    bos, first = special[0], len(pieces)
    described: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [special_token(first + number, one) for number, one in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _WORDS},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**_BYTES, "add_prefix_space": False},
            ],
        },
        "post_processor": beginning({bos: first}),
        "decoder": {**_BYTES, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # as in tiktoken, a word that is a token becomes that token
            "vocab": vocab,
            "merges": [
                [piece[:cut], piece[cut:]]
                for piece in pieces
                for cut in range(1, len(piece))
                if piece[:cut] in vocab and piece[cut:] in vocab
            ],
        },
    }
    return json.dumps(described, ensure_ascii=False).encode()


def config_json(special: tuple[str, ...] = LLAMA31) -> bytes:
    """Returns the `tokenizer_config.json` that transformers needs with it."""
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[1],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return json.dumps(values, indent=2).encode() + b"\n"


_BYTES = {"type": "ByteLevel", "trim_offsets": True, "use_regex": False}
