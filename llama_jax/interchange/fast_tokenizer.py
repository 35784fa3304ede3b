"""Converts a SentencePiece model to the `tokenizer.json` of Hugging Face's tokenizers library.

transformers 5 would read tokenizer.model itself, but by its own rules (it adds no space to a text
that begins with one). Here all rules are written out, and their ids are compared with those of
SentencePiece before a file is written. As in `SentencePiece`, the beginning of a text gets a space,
and the text after a special token gets none. (The files that were released with LLaMA add a space
there, too.) So a chat template gives the same ids with either file.

Control pieces become special tokens. User-defined pieces do not become added tokens: tokenizers
takes added tokens out of a text before it adds the space, SentencePiece afterwards. Instead, they
are cut out after the space is added, and are then whole pieces of the vocabulary.
"""

import itertools
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from llama_jax.errors import UserError, first_line
from llama_jax.interchange import bpe_rules
from llama_jax.text.probe_texts import HARD_TEXTS
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_formats import SPACE, model_proto
from llama_jax.text.tokenizer_json import with_bos_eos
from llama_jax.text.tokenizer_parts import beginning, special_token

_KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}  # values of trainer_spec.model_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of a piece
_CHECKED = 20_000  # maximum number of texts that are made of pieces
# Stands for spaces that were removed from the beginning of a text. It cannot occur in a text, which
# has no space at that point.
_REMOVED = f"{SPACE} {SPACE}"


def fast_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Returns a `tokenizer.json` and `tokenizer_config.json` with the ids of a SentencePiece model.

    Raises:
      UserError: tokenizer.json cannot express the model, or the tokenizers library, which checks
        the file, is not installed.
    """
    model = model_proto(tokenizer.model_bytes)
    _refuse_other_kinds(model)
    contents = json.dumps(_contents(model, tokenizer), ensure_ascii=False).encode() + b"\n"
    config = _config(tokenizer, "PreTrainedTokenizerFast")
    _check(tokenizer, contents, json.loads(config), model)
    return {"tokenizer.json": contents, "tokenizer_config.json": config}


def slow_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Returns a `tokenizer_config.json` for a tokenizer.model alone.

    In transformers 5, the class that it names encodes with SentencePiece itself; older versions
    refuse it. (LLaMA's class would not follow the rules of the model.) It decodes a byte piece to
    the name of the piece.
    """
    pattern = {"special_tokens_pattern": "bos" if tokenizer.prefix else "none"}
    return {"tokenizer_config.json": _config(tokenizer, "SentencePieceBackend", **pattern)}


def _config(tokenizer: Tokenizer, name: str, **more: str) -> bytes:
    config = {
        "tokenizer_class": name,
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "clean_up_tokenization_spaces": False,
        **more,
    }
    return json.dumps(config, ensure_ascii=False, indent=2).encode() + b"\n"


def _refuse_other_kinds(model: Any) -> None:
    """Raises `UserError` for models that tokenizer.json cannot express: it gave other ids."""
    normalizer, kind = model.normalizer_spec, _KINDS.get(model.trainer_spec.model_type, "unknown")
    if kind == "unigram":
        raise UserError(
            "it is a unigram model, whose sums SentencePiece rounds to single precision"
        )
    if kind not in ("BPE", "char"):
        raise UserError(f"it is a {kind} model")
    if normalizer.precompiled_charsmap:
        raise UserError(
            f"its normalizer, {normalizer.name or 'custom'}, replaces sequences of characters"
        )
    if model.denormalizer_spec.precompiled_charsmap:
        raise UserError("it has a denormalizer")
    if model.trainer_spec.treat_whitespace_as_suffix:
        raise UserError("it puts spaces at the end of words (treat_whitespace_as_suffix)")
    if not normalizer.escape_whitespaces:
        raise UserError("it does not escape spaces (escape_whitespaces)")
    for piece in model.pieces:
        if piece.type == _USER_DEFINED and " " in piece.piece:
            raise UserError(f"its user-defined piece {piece.piece!r} has a space")
        if piece.type in (_CONTROL, _UNUSED) and len(piece.piece) == 1:
            raise UserError(
                f"SentencePiece encodes {piece.piece!r} without its piece, "
                "which has the type control or unused"
            )
        if math.isnan(piece.score):
            raise UserError(f"the score of its piece {piece.piece!r} is not a number")


def _contents(model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    user_defined = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    rules = _rules(model, user_defined)
    for rule in rules:
        for part in rule:
            if part not in vocab:  # a single character
                raise UserError(
                    f"its piece {''.join(rule)!r} is made of {part!r}, which is not a piece"
                )
    bos = {tokenizer.piece(token): token for token in tokenizer.prefix}
    pre_tokenizers = [*_spaces(model), *_cuts(model, user_defined, rules)]
    return {
        "version": "1.0",
        "added_tokens": [
            special_token(vocab[piece.piece], piece.piece)
            for piece in model.pieces
            if piece.type == _CONTROL
        ],
        "normalizer": _sequence("Normalizer", _normalizers(model)),
        "pre_tokenizer": _sequence("PreTokenizer", pre_tokenizers),
        "post_processor": beginning(bos) if bos else None,
        "decoder": _sequence("Decoder", _decoders(model)),
        "model": {
            "type": "BPE",
            "unk_token": _unknown(model),
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": bool(user_defined),  # a part that is itself a piece is not split
            "vocab": vocab,
            "merges": rules,
        },
    }


def _unknown(model: Any) -> str:
    return next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN)


def _scores(model: Any) -> dict[str, float]:
    """Returns the scores of the pieces that characters can form."""
    if model.trainer_spec.model_type != 2:
        return {}
    kinds = (_NORMAL, _USER_DEFINED, _UNUSED)
    return {piece.piece: piece.score for piece in model.pieces if piece.type in kinds}


def _rules(model: Any, user_defined: Sequence[str]) -> list[bpe_rules.Rule]:
    scores = _scores(model)
    inside = re.compile("|".join(map(re.escape, user_defined)) or r"\A(?!)")
    rules = bpe_rules.rules(scores, (piece for piece in scores if not inside.search(piece)))
    unused = {piece.piece for piece in model.pieces if piece.type == _UNUSED}
    for left, right in rules:
        if left + right in unused:
            raise UserError(f"it makes the unused piece {left + right!r} and then splits it again")
    return rules


def _normalizers(model: Any) -> list[dict[str, Any]]:
    """Returns the normalizers, which replace spaces.

    They run before Metaspace, which adds no space to a text that begins with its replacement.
    """
    if not model.normalizer_spec.remove_extra_whitespaces:
        return [_replace({"String": " "}, SPACE)]
    found = [
        _replace({"Regex": "(?<=[^ ]) +"}, SPACE),
        _replace({"Regex": rf"{SPACE}+\z"}, ""),
        _replace({"Regex": r"\A +\z"}, ""),
    ]
    if not model.normalizer_spec.add_dummy_prefix:
        return [*found, _replace({"String": " "}, "")]
    # If its first character were removed, the text would not count as the beginning in `_spaces`.
    first = _replace({"Regex": r"\A "}, _REMOVED)
    return [*found, first, _replace({"Regex": rf"(?<=\A{_REMOVED}) +"}, "")]


def _spaces(model: Any) -> list[dict[str, Any]]:
    """Returns pre-tokenizers that add a space before a text, but not after special tokens."""
    if not model.normalizer_spec.add_dummy_prefix:
        return []
    first = _metaspace(" ", "first")
    if not model.normalizer_spec.remove_extra_whitespaces:
        return [first, _metaspace(SPACE, "never")]
    removed = [_cut(rf"\A {_REMOVED[:-1]}", "Removed"), _cut(rf"\A{_REMOVED}", "Removed")]
    return [first, *removed, _metaspace(SPACE, "never")]


def _decoders(model: Any) -> list[dict[str, Any]]:
    surface = model.trainer_spec.unk_surface
    found = [_replace({"Regex": rf"\A{_escaped(_unknown(model))}\z"}, surface)]
    found.append(_replace({"String": SPACE}, " "))
    found += [{"type": "ByteFallback"}] if model.trainer_spec.byte_fallback else []
    found.append({"type": "Fuse"})
    normalizer = model.normalizer_spec
    if normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        found.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return found


def _cuts(
    model: Any, user_defined: Sequence[str], rules: Sequence[bpe_rules.Rule]
) -> list[dict[str, Any]]:
    """Returns pre-tokenizers that cut out user-defined pieces, so that each is looked up whole.

    Other pieces may be looked up whole only if merge rules make them. So a part that equals any
    other piece is cut where SentencePiece splits that piece.
    """
    if not user_defined:
        return []
    pattern = re.compile("|".join(map(re.escape, user_defined)))
    whole = {"".join(rule) for rule in rules} | set(user_defined)
    scores, parts = _scores(model), defaultdict(list)
    wrong = {
        piece.piece
        for piece in model.pieces
        if len(piece.piece) > 1 and piece.piece not in whole and not pattern.search(piece.piece)
    }
    for piece in sorted(wrong):
        symbols, _ = bpe_rules.split(piece, scores)
        ends = itertools.accumulate(map(len, symbols[:-1]))
        cuts = [end for end in ends if not {piece[:end], piece[end:]} & wrong]
        if not cuts:
            raise UserError(f"between user-defined pieces, {piece!r} would be taken for one piece")
        parts[piece[: cuts[0]]].append(piece[cuts[0] :])
    longest_first = sorted(user_defined, key=len, reverse=True)
    found = [_cut("|".join(map(_escaped, longest_first)))]
    if parts:
        starts = (
            rf"{_escaped(start)}(?=(?:{'|'.join(map(_escaped, rests))})\z)"
            for start, rests in parts.items()
        )
        found.append(_cut(rf"\A(?:{'|'.join(starts)})"))
    return found


def _escaped(text: str) -> str:
    """Escapes a text for a regular expression of Oniguruma."""
    return re.sub(r"([\\.^$|?*+()\[\]{}])", r"\\\1", text)


def _check(tokenizer: Tokenizer, contents: bytes, config: dict[str, Any], model: Any) -> None:
    """Raises `UserError` if the file gives other ids or texts than SentencePiece."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "the tokenizers library, which checks it, is missing: pip install 'llama_jax[hf]'"
        ) from error
    try:
        library = tokenizers.Tokenizer.from_str(contents.decode())
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"the tokenizers library refuses it: {first_line(error)}") from error
    library.encode_special_tokens = True  # their names in a text are plain text
    for text in (*HARD_TEXTS, *_made_texts(model)):  # no batch: threads do not survive a fork
        ids = tokenizer.encode_text(text)
        if library.encode(text).ids != ids:
            raise UserError(f"it would give other ids for {_shown(text)}")
        # Both write a space as U+2581; only texts that contain it decode differently.
        if SPACE not in text and library.decode(ids) != tokenizer.decode(ids):
            raise UserError(f"it would decode the ids of {_shown(text)} to another text")
    written = Tokenizer(with_bos_eos(contents, config, "tokenizer.json"))
    for name in tokenizer.special_names:
        for text in (f"{name}a", f" a {name} b", f"a\n{name}{name}  c"):
            if written.encode(text, special=True) != tokenizer.encode(text, special=True):
                raise UserError(f"it would give other ids for {_shown(text)}")


def _made_texts(model: Any) -> Iterator[str]:
    """Yields texts made of the model's own pieces: each piece alone, and several in a row."""
    draw = random.Random(0)
    texts = [piece.piece.replace(SPACE, " ") for piece in model.pieces]
    yield from texts
    named = [
        piece.piece.replace(SPACE, " ")
        for piece in model.pieces
        if piece.type in (_CONTROL, _USER_DEFINED)
    ]
    for name in [*named[:1000], *texts[:50]]:
        yield from (f"{name}a", f" {name} b", f"a{name}{name}  c", f"a {name} ", f"\n{name}\n")
        yield name + draw.choice(texts) + name
    count = min(_CHECKED, 8 * len(texts))
    for number in range(count):
        yield "".join(draw.choices(texts, k=2 + number % 4))
    letters = sorted({letter for text in texts for letter in text})
    for _ in range(count // 4):  # few characters, so that pieces overlap
        few = draw.choices(letters, k=draw.randint(1, 4))
        yield "".join(draw.choices(few, k=draw.randint(2, 24)))
    yield from ("".join(draw.choices(texts, k=1000)) for _ in range(2))


def _shown(text: str) -> str:
    return repr(text) if len(text) < 60 else f"{text[:50]!r}..."


def _sequence(kind: str, parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Combines parts of one kind into one; returns None without parts."""
    names = {"Normalizer": "normalizers", "PreTokenizer": "pretokenizers", "Decoder": "decoders"}
    if len(parts) < 2:
        return parts[0] if parts else None
    return {"type": "Sequence", names[kind]: parts}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _cut(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


def _metaspace(letter: str, where: str) -> dict[str, Any]:
    """Returns a pre-tokenizer that writes spaces as `letter`, and may add one before a text."""
    return {"type": "Metaspace", "replacement": letter, "prepend_scheme": where, "split": False}
