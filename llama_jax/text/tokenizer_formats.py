"""What `Tokenizer` needs of a format, and the first of the two: SentencePiece models.

The other is Hugging Face's `tokenizer.json` (`tokenizer_json`), which Llama 3's own format becomes
(`tiktoken_ranks`).
"""

import functools
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import sentencepiece

from llama_jax.errors import UserError, first_line

SPACE = "\u2581"  # how SentencePiece writes a space
# Keeps what it stands in from being the name of a special token; Unicode reserves it for such uses.
MARK = "\ufdd0"
_CONTROL, _USER_DEFINED = 3, 4  # of sentencepiece_model.proto


class Vocabulary(Protocol):
    """What `Tokenizer` needs of a format.

    Attributes:
      size: all ids are below it.
      bos_id: begins a text.
      eos_id: ends it.
      prefix: tokens that stand before a text for the model: BOS, or none.
      adds_space: whether a space is put before every text.
    """

    size: int
    bos_id: int
    eos_id: int
    prefix: tuple[int, ...]
    adds_space: bool

    @property
    def special_names(self) -> list[str]:
        """How special tokens are written."""

    @property
    def marker_names(self) -> list[str]:
        """Those, and names of other tokens that may mark turns: see `is_marker`."""

    def normalizes_to_marker(self, text: str) -> bool:
        """Whether the tokenizer takes a text without such names for one with them."""

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


def is_marker(name: str) -> bool:
    """Whether a token that is not special may mark a turn, such as `<|im_end|>` or `[INST]`.

    Not white space, of which tokenizers add runs, and not a word: they are what texts are made of.
    """
    return re.search(r"[^\w\s]|_", name.replace(SPACE, " ")) is not None


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """Finds names, the longest first; in a group, so that `split` keeps them."""
    longest = sorted(filter(None, names), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest)) or '(?!)'})")


@functools.cache
def byte_of_letter() -> dict[str, int]:
    """The letters that byte-level BPE writes for bytes: visible Latin-1 for itself, else U+0100 on.

    As in GPT-2 (https://github.com/openai/gpt-2, `encoder.py`).
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def model_proto(model_bytes: bytes) -> Any:
    """The message of a SentencePiece model, whose fields can be read and changed.

    Raises:
      UserError: the library of protocol buffers is too old for sentencepiece's description of it.
    """
    try:  # only where it is needed: other packages may ask for an old library
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:
        raise UserError(
            f"sentencepiece needs a newer protobuf: pip install -U protobuf ({first_line(error)})"
        ) from error
    return vars(sentencepiece_model_pb2)["ModelProto"].FromString(model_bytes)


class SentencePiece:
    """A SentencePiece model: LLaMA, LLaMA-2, Mistral, Code Llama, and what `prepare` trains."""

    def __init__(self, model_bytes: bytes, name: str) -> None:
        """Parses a `.model` file; raises `UserError` where it is none, or has no BOS or EOS."""
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
        """See `Vocabulary`."""
        return self.encode_spans(text)[0] if special else self._processor.encode(text)

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See `Vocabulary`; SentencePiece itself never parses the names of control tokens."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for number, part in enumerate(self._control_pattern.split(text)):
            if number % 2:
                ids.append(self._processor.piece_to_id(part))
                spans.append((at, at + len(part)))
            elif part:  # as in transformers, only a text's own beginning gets a space
                places = [at + index for index, letter in enumerate(part) if letter != MARK]
                places.append(at + len(part))
                for token, start, stop in self._encode_part(part, spaced=not ids):
                    ids.append(token)
                    spans.append((places[start], places[stop]))
            at += len(part)
        return ids, spans

    def _encode_part(self, part: str, *, spaced: bool) -> list[tuple[int, int, int]]:
        """Tokens of a text without control tokens, and which of its letters but marks they are.

        SentencePiece finds user-defined pieces in any text, and reads what stands between them by
        itself. One that a mark stands in is read once more, as text.
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
        """See `Vocabulary`."""
        return [self.piece(i) for i in range(self.size) if self._processor.is_control(i)]

    @functools.cached_property
    def _user_defined(self) -> frozenset[str]:
        """Pieces that SentencePiece finds in any text, and that may mark turns."""
        kinds = model_proto(self._model_bytes)
        return frozenset(
            one.piece for one in kinds.pieces if one.type == _USER_DEFINED and is_marker(one.piece)
        )

    @property
    def marker_names(self) -> list[str]:
        """See `Vocabulary`."""
        return [*self.special_names, *sorted(self._user_defined)]

    def normalizes_to_marker(self, text: str) -> bool:
        """See `Vocabulary`."""
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
        """The model; not `spaced`: without a space before a text; `plain`: names are text."""
        if (spaced, plain) == (True, False):
            return self._processor
        if (spaced, plain) not in self._variants:
            model = model_proto(self._model_bytes)
            if not spaced:
                model.normalizer_spec.add_dummy_prefix = False
            for one in model.pieces if plain else ():
                if one.piece in self._user_defined:
                    one.type = _CONTROL  # which no text becomes
            made = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
            self._variants[spaced, plain] = made
        return self._variants[spaced, plain]

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
