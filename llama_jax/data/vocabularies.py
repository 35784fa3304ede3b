"""The two formats of tokenizers: SentencePiece models and Hugging Face's `tokenizer.json`.

`Tokenizer` is what everybody uses; it has one of these inside, by the first byte of the file.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece

from llama_jax.errors import UserError

SPACE = "\u2581"  # how SentencePiece writes a space
# Keeps what it stands in from being the name of a special token; Unicode reserves it for such uses.
MARK = "\ufdd0"
# Where a tokenizer.json does not say which tokens begin and end a text, these do.
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")
# Our addition to a tokenizer.json whose BOS or EOS has another name: {"bos": NAME, "eos": NAME}.
ENDS = "llama_jax"
# A post-processor adds special tokens, which templates write themselves, and would cut spaces off
# the spans of tokens.
_NOTHING_ADDED: dict[str, Any] = {"post_processor": None}


class Vocabulary(Protocol):
    """What `Tokenizer` needs of a format.

    Attributes:
      size: all ids are below it.
      bos_id: begins a text.
      eos_id: ends it.
      adds_space: whether a space is put before every text.
    """

    size: int
    bos_id: int
    eos_id: int
    adds_space: bool

    @property
    def special_names(self) -> list[str]:
        """How special tokens are written."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids, without BOS and EOS; `special`: names of special tokens become these.

        But not a name that a `MARK` stands in; marks themselves add nothing then.
        """

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode` with `special`, and of each token the letters that it stands for.

        Of a letter made of several tokens, some may have an empty span at its place.
        """

    def encode_documents(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """Token ids of several texts, int32, each from BOS to EOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""

    def piece(self, token: int) -> str:
        """How the format writes one token."""

    def bytes_of(self, token: int) -> bytes | None:
        """What a token adds to the text, perhaps part of a character; of a special one None."""


class SentencePiece:
    """A SentencePiece model: LLaMA, LLaMA-2, Mistral, Code Llama, and what `prepare` trains."""

    def __init__(self, model_bytes: bytes, name: str) -> None:
        """Parses a `.model` file; raises `UserError` where it is none, or has no BOS or EOS."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{name} is not a SentencePiece model") from error
        self._model_bytes = model_bytes
        self.size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{name} has no BOS or no EOS token")
        self.adds_space = "".join(self._processor.encode_as_pieces("a")).startswith(SPACE)

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Vocabulary`."""
        return self.encode_spans(text)[0] if special else self._processor.encode(text)

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See `Vocabulary`; SentencePiece itself never parses the names of control tokens."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for number, part in enumerate(self._control_names.split(text)):
            if number % 2:
                ids.append(self._processor.piece_to_id(part))
                spans.append((at, at + len(part)))
            elif part:  # as in transformers, only a text's own beginning gets a space
                processor = self._without_space if ids else self._processor
                found = processor.encode(part.replace(MARK, ""), return_type="offset_mapping")
                places = [at + index for index, letter in enumerate(part) if letter != MARK]
                places.append(at + len(part))
                ids += found["ids"]
                spans += [(places[start], places[stop]) for start, stop in found["offsets"]]
            at += len(part)
        return ids, spans

    @functools.cached_property
    def special_names(self) -> list[str]:
        """See `Vocabulary`."""
        return [self.piece(i) for i in range(self.size) if self._processor.is_control(i)]

    @functools.cached_property
    def _control_names(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, self.special_names))})")

    @functools.cached_property
    def _without_space(self) -> sentencepiece.SentencePieceProcessor:
        from sentencepiece import sentencepiece_model_pb2

        model = vars(sentencepiece_model_pb2)["ModelProto"].FromString(self._model_bytes)
        model.normalizer_spec.add_dummy_prefix = False
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def encode_documents(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """See `Vocabulary`."""
        return self._processor.encode_as_numpy(
            list(texts), add_bos=True, add_eos=True, num_threads=threads
        )

    def decode(self, ids: Sequence[int]) -> str:
        """See `Vocabulary`."""
        return self._processor.decode([token for token in ids if token < self.size])

    def piece(self, token: int) -> str:
        """See `Vocabulary`."""
        return self._processor.id_to_piece(token)

    def bytes_of(self, token: int) -> bytes | None:
        """See `Vocabulary`."""
        if token >= self.size or self._processor.is_control(token):
            return None
        if self._processor.is_unknown(token):
            return " ⁇ ".encode()  # as SentencePiece decodes it
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):  # written <0x0A>
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


def _parts(described: Any) -> Iterator[dict[str, Any]]:
    """All parts of a tokenizer.json, however deep their sequences."""
    if isinstance(described, dict):
        yield described
        for value in described.values():
            yield from _parts(value)
    elif isinstance(described, list):
        for value in described:
            yield from _parts(value)


def _whole(described: str) -> Any:
    """The library's tokenizer; saved so, it would else cut or pad what it encodes."""
    import tokenizers

    found = tokenizers.Tokenizer.from_str(described)
    found.no_truncation()
    found.no_padding()
    return found


class TokenizerJson:
    """A `tokenizer.json`: LLaMA-3's byte-level BPE, or a SentencePiece model in this format."""

    def __init__(self, model_bytes: bytes, name: str) -> None:
        """Parses the JSON; raises `UserError` where it is none, or BOS and EOS are unknown."""
        try:
            described = json.loads(model_bytes)
            ends = described.pop(ENDS, {})
            self._json = json.dumps(described)
            self._tokenizer = _whole(self._json)
        except ImportError as error:
            raise UserError(
                f"{name} is a tokenizer.json, which the tokenizers library reads: "
                "pip install 'llama_jax[hf]'"
            ) from error
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"{name} is not a tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True  # their names in a text are text
        self._added = self._tokenizer.get_added_tokens_decoder()
        self.size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        first = [
            part["SpecialToken"]["id"]
            for processor in _parts(described.get("post_processor"))
            for part in processor.get("single", ())[:1]
            if "SpecialToken" in part
        ]
        self.bos_id = self._id_of((ends["bos"],) if "bos" in ends else (*first, *BOS_NAMES))
        self.eos_id = self._id_of((ends["eos"],) if "eos" in ends else EOS_NAMES)
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(
                f"{name} has no BOS or no EOS token of a known name; put the tokenizer_config.json "
                "that names them beside it"
            )
        kinds = [part.get("type") for part in _parts(described.get("decoder"))]
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self.adds_space = self._pieces("a").startswith(SPACE)

    def _id_of(self, names: Sequence[str]) -> int:
        ids = (self._tokenizer.token_to_id(name) for name in names)
        return next((found for found in ids if found is not None), -1)

    def _pieces(self, text: str) -> str:
        return "".join(self._tokenizer.encode(text, add_special_tokens=False).tokens)

    @functools.cached_property
    def special_names(self) -> list[str]:
        """See `Vocabulary`."""
        return [token.content for token in self._added.values() if token.special]

    @functools.cached_property
    def _parsing(self) -> Any:
        """The same tokenizer, that takes the names of special tokens for these."""
        return _whole(json.dumps({**json.loads(self._json), **_NOTHING_ADDED}))

    @functools.cached_property
    def _parsing_marked(self) -> Any:
        """As `_parsing`, but marks are taken out where no special token was found."""
        described = json.loads(self._json) | _NOTHING_ADDED
        drop = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
        rest = [described["normalizer"]] if described.get("normalizer") else []
        described["normalizer"] = {"type": "Sequence", "normalizers": [drop, *rest]}
        for token in described["added_tokens"]:
            if token["special"]:  # else looked for once more when the marks are out
                token["normalized"] = False
        return _whole(json.dumps(described))

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Vocabulary`."""
        if special:
            return self.encode_spans(text)[0]
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See `Vocabulary`."""
        tokenizer = self._parsing_marked if MARK in text else self._parsing
        found = tokenizer.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def encode_documents(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """See `Vocabulary`; more than one thread is as many as the library likes."""
        if threads == 1:  # never its thread pool, which does not survive a fork
            rows = [self.encode(text, False) for text in texts]
        else:
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            rows = [one.ids for one in encoded]
        return [np.array([self.bos_id, *row, self.eos_id], np.int32) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Vocabulary`."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """See `Vocabulary`."""
        return self._tokenizer.id_to_token(token) or ""

    def bytes_of(self, token: int) -> bytes | None:
        """See `Vocabulary`."""
        if token in self._added:
            added = self._added[token]
            return None if added.special else added.content.encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return None
        if self._byte_level:
            return bytes(byte_of_letter()[letter] for letter in piece)
        if self._byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


@functools.cache
def byte_of_letter() -> dict[str, int]:
    """The letters that byte-level BPE writes for bytes: visible Latin-1 for itself, else U+0100 on.

    As in GPT-2 (https://github.com/openai/gpt-2, `encoder.py`).
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def with_ends(model_bytes: bytes, config: dict[str, Any], name: str) -> bytes:
    """A tokenizer.json that says which tokens its `tokenizer_config.json` calls BOS and EOS.

    Unchanged where it is found by itself.
    """
    ends = {}
    for end in ("bos", "eos"):
        token = config.get(f"{end}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token is not None:
            ends[end] = token
    described = json.loads(model_bytes)
    try:
        found = TokenizerJson(model_bytes, name)
        same = all(found.piece(getattr(found, f"{end}_id")) == ends[end] for end in ends)
    except UserError:
        same = False
    return model_bytes if same else json.dumps({ENDS: ends, **described}).encode()


def without_ends(model_bytes: bytes) -> bytes:
    """The tokenizer.json that other programs read: `with_ends` undone."""
    described = json.loads(model_bytes)
    if ENDS not in described:
        return model_bytes
    del described[ENDS]
    return json.dumps(described).encode()
