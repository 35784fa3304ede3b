"""The interface of a tokenizer's format, and the first of two formats: SentencePiece models.

The second is Hugging Face's `tokenizer.json` (`tokenizer_json`). Llama 3's own format is converted
to it (`tiktoken_ranks`).
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece

from llama_jax.errors import UserError, first_line

SPACE = "\u2581"  # how SentencePiece writes a space
# A mark inside the name of a special token keeps the name from being parsed. It is a noncharacter,
# which Unicode reserves for internal use.
MARK = "\ufdd0"
_CONTROL, _USER_DEFINED = 3, 4  # types of pieces in sentencepiece_model.proto


class Vocabulary(Protocol):
    """The interface of a format, which `Tokenizer` uses.

    Attributes:
      size: all ids are below this number.
      bos_id: id of the token that begins a text.
      eos_id: id of the token that ends a text.
      prefix: ids that begin a text for the model: BOS, or nothing.
      adds_space: True if encoding adds a space before every text.
    """

    size: int
    bos_id: int
    eos_id: int
    prefix: tuple[int, ...]
    adds_space: bool

    @property
    def special_names(self) -> list[str]:
        """The names of special tokens."""

    @property
    def marker_names(self) -> list[str]:
        """The names of special tokens, and of other tokens that may mark turns (`is_marker`)."""

    def normalizes_to_marker(self, text: str) -> bool:
        """Returns whether normalization turns a part of the text into one of `marker_names`."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Returns the token ids of a text, without BOS and EOS.

        With `special`, the names of special tokens in the text become these tokens, except names
        that contain a `MARK`; marks themselves then add nothing.
        """

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns token ids (see `encode` with `special`), and each token's range of characters.

        If a character has several tokens, some of them may have an empty range at its position.
        """

    def encode_documents(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """Returns the token ids of several texts, int32, each from BOS to EOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""

    def piece(self, token: int) -> str:
        """Returns the name of a token in the file."""

    def bytes_of(self, token: int) -> bytes | None:
        """Returns the UTF-8 bytes that a token adds to the text; None for a special token.

        They may be a part of a character.
        """


def is_marker(name: str) -> bool:
    """Returns whether a token that is not special may mark a turn, like `<|im_end|>` or `[INST]`.

    White space (tokenizers have tokens for runs of it) and words do not: ordinary texts contain
    them.
    """
    return re.search(r"[^\w\s]|_", name.replace(SPACE, " ")) is not None


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """Returns a pattern that finds names, the longest first; `split` keeps them, by its group."""
    longest = sorted(filter(None, names), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})")


@functools.cache
def byte_of_letter() -> dict[str, int]:
    """Returns the byte of each character in which byte-level BPE writes bytes.

    As in GPT-2 (https://github.com/openai/gpt-2, `encoder.py`), visible characters of Latin-1 stand
    for their own bytes, and the characters from U+0100 on for the other bytes.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def model_proto(model_bytes: bytes) -> Any:
    """Parses a SentencePiece model into a protobuf message, whose fields can be read and changed.

    Raises:
      UserError: the installed protobuf is too old for sentencepiece's generated code.
    """
    try:  # imported only here, since other packages may require an old protobuf
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:
        raise UserError(
            f"sentencepiece needs a newer protobuf: pip install -U protobuf ({first_line(error)})"
        ) from error
    return vars(sentencepiece_model_pb2)["ModelProto"].FromString(model_bytes)


class SentencePiece:
    """A SentencePiece model, as of LLaMA, LLaMA-2, Mistral, Code Llama, and from `prepare`."""

    def __init__(self, model_bytes: bytes, name: str) -> None:
        """Parses a `.model` file.

        Raises:
          UserError: the file is not a SentencePiece model, or has no BOS or no EOS.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except (RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"{name} is not a SentencePiece model") from error
        self._model_bytes = model_bytes
        self._variants: dict[tuple[bool, bool], sentencepiece.SentencePieceProcessor] = {}
        self.size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{name} has no BOS or no EOS token")
        self.prefix: tuple[int, ...] = (self.bos_id,)  # as in LLaMA's own code
        self.adds_space = "".join(self._processor.encode_as_pieces("a")).startswith(SPACE)

    def encode(self, text: str, special: bool) -> list[int]:
        """Encodes a text; see `Vocabulary.encode`."""
        return self.encode_spans(text)[0] if special else self._processor.encode(text)

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes a text with special tokens; see `Vocabulary.encode_spans`.

        SentencePiece itself never parses the names of control tokens.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for number, part in enumerate(self._control_pattern.split(text)):
            if number % 2:
                ids.append(self._processor.piece_to_id(part))
                spans.append((at, at + len(part)))
            elif part:  # as in transformers, only the beginning of the whole text gets a space
                places = [at + index for index, letter in enumerate(part) if letter != MARK]
                places.append(at + len(part))
                for token, start, stop in self._encode_part(part, spaced=not ids):
                    ids.append(token)
                    spans.append((places[start], places[stop]))
            at += len(part)
        return ids, spans

    def _encode_part(self, part: str, *, spaced: bool) -> list[tuple[int, int, int]]:
        """Encodes a text without control tokens.

        SentencePiece finds user-defined pieces in any text, and encodes the text between them
        separately. A piece whose name contains a mark is encoded again, as text.

        Returns:
          For each token its id and its range of characters; the positions do not count marks.
        """
        letters = part.replace(MARK, "")
        found = self._variant(spaced=spaced).encode(letters, return_type="offset_mapping")
        tokens = [
            (token, *span) for token, span in zip(found["ids"], found["offsets"], strict=True)
        ]
        if letters == part or not self._user_defined:
            return tokens
        before = [index for index, letter in enumerate(part) if letter != MARK]
        read: list[tuple[int, int, int]] = []
        for token, start, stop in tokens:
            whole = part[before[start] : before[stop - 1] + 1] if stop > start else ""
            if MARK in whole and self.piece(token) in self._user_defined:
                again = self._variant(spaced=False, plain=True).encode(
                    letters[start:stop], return_type="offset_mapping"
                )
                offsets = [(start + first, start + last) for first, last in again["offsets"]]
                read += [(one, *span) for one, span in zip(again["ids"], offsets, strict=True)]
            else:
                read.append((token, start, stop))
        return read

    @functools.cached_property
    def special_names(self) -> list[str]:
        """The names of special tokens."""
        return [self.piece(i) for i in range(self.size) if self._processor.is_control(i)]

    @functools.cached_property
    def _user_defined(self) -> frozenset[str]:
        """The user-defined pieces, which SentencePiece finds in any text, that may mark turns."""
        kinds = model_proto(self._model_bytes)
        return frozenset(
            one.piece for one in kinds.pieces if one.type == _USER_DEFINED and is_marker(one.piece)
        )

    @property
    def marker_names(self) -> list[str]:
        """The names of special tokens, and of other tokens that may mark turns."""
        return [*self.special_names, *sorted(self._user_defined)]

    def normalizes_to_marker(self, text: str) -> bool:
        """Returns whether normalization makes a marker; see `Vocabulary.normalizes_to_marker`."""
        if not self._user_defined or text.isascii():
            return False
        normal = self._processor.normalize(text).replace(SPACE, " ")
        return any(name.replace(SPACE, " ") in normal for name in self._user_defined)

    @functools.cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return _any_of(self.special_names)

    def _variant(
        self, *, spaced: bool, plain: bool = False
    ) -> sentencepiece.SentencePieceProcessor:
        """Returns a variant of the model.

        Args:
          spaced: False: the model puts no space before a text.
          plain: True: the names of user-defined pieces stay text.
        """
        if (spaced, plain) == (True, False):
            return self._processor
        if (spaced, plain) not in self._variants:
            model = model_proto(self._model_bytes)
            if not spaced:
                model.normalizer_spec.add_dummy_prefix = False
            for one in model.pieces if plain else ():
                if one.piece in self._user_defined:
                    one.type = _CONTROL  # no text is encoded as a control token
            made = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
            self._variants[spaced, plain] = made
        return self._variants[spaced, plain]

    def encode_documents(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """Encodes several texts, each from BOS to EOS."""
        return self._processor.encode_as_numpy(
            list(texts), add_bos=True, add_eos=True, num_threads=threads
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self._processor.decode([token for token in ids if token < self.size])

    def piece(self, token: int) -> str:
        """Returns the name of a token in the file."""
        return self._processor.id_to_piece(token)

    def bytes_of(self, token: int) -> bytes | None:
        """Returns the bytes that a token adds to the text; see `Vocabulary.bytes_of`."""
        if token >= self.size or self._processor.is_control(token):
            return None
        if self._processor.is_unknown(token):
            return " ⁇ ".encode()  # as SentencePiece decodes it
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):  # written <0x0A>
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()
