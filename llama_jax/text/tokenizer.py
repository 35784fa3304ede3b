"""Tokenizers: one interface over two formats, and training SentencePiece by LLaMA's recipe."""

import codecs
import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from llama_jax.errors import UserError
from llama_jax.files import parse_json, refuse_lfs_pointer
from llama_jax.text import tiktoken_ranks, tokenizer_process
from llama_jax.text.probe_texts import HARD_TEXTS
from llama_jax.text.tokenizer_formats import MARK, SentencePiece, Vocabulary
from llama_jax.text.tokenizer_json import TokenizerJson, with_bos_eos

# SentencePiece skips longer "sentences" and reads its sample into memory; both limits are generous
# for a recipe that learns frequent pieces, and keep training on any corpus within minutes.
MAX_SENTENCE_BYTES = 16_384
SAMPLE_BYTES = 64_000_000


class Tokenizer:
    """Text to token ids and back: `decode(encode(text)) == text`, but for U+2581.

    That character is how SentencePiece itself writes a space, and comes back as one.

    Attributes:
      model_bytes: the file, which says itself of which format it is.
      fingerprint: sha256 of it.
      vocab_size: all ids are below it.
      bos_id: begins a text.
      eos_id: ends it.
      prefix: what `encode_text` puts before a text: BOS, or nothing.
      is_json: it is a tokenizer.json.
    """

    def __init__(
        self, model_bytes: bytes, name: str = "the tokenizer", *, adds_bos: bool | None = None
    ) -> None:
        """Wraps a serialized tokenizer.

        Args:
          model_bytes: contents of a SentencePiece `.model` file, of a `tokenizer.json`, or of Llama
            3's `tokenizer.model`.
          name: what to call it in an error.
          adds_bos: whether a text begins with BOS; None: as the file says. A `tokenizer.json` says
            so by its post-processor, the others always add it.

        Raises:
          UserError: the bytes are none of these, or one without BOS and EOS.
        """
        refuse_lfs_pointer(model_bytes, name)
        self._vocabulary: Vocabulary
        self.is_json = model_bytes.lstrip()[:1] == b"{"
        if self.is_json:
            self._vocabulary = TokenizerJson(model_bytes, name)
        elif tiktoken_ranks.is_tiktoken(model_bytes):
            made = tiktoken_ranks.tokenizer_json(model_bytes, name)
            self._vocabulary = TokenizerJson(made, name)
        else:
            self._vocabulary = SentencePiece(model_bytes, name)
        self.model_bytes = model_bytes
        self.fingerprint = hashlib.sha256(model_bytes).hexdigest()
        self.vocab_size = self._vocabulary.size
        self.bos_id = self._vocabulary.bos_id
        self.eos_id = self._vocabulary.eos_id
        self.prefix = self._vocabulary.prefix
        if adds_bos is not None:
            self.prefix = (self.bos_id,) if adds_bos else ()

    @classmethod
    def load(cls, path: epath.PathLike) -> "Tokenizer":
        """Reads a `.model` file or a `tokenizer.json`, with the tokenizer_config.json beside it.

        `tokenizer_files.open_tokenizer` also reads folders.

        Raises:
          UserError: it cannot be read, or is none.
        """
        path, name = epath.Path(path), f"tokenizer {path}"
        try:
            model_bytes = path.read_bytes()
            config, more = (
                _beside(path, file) for file in ("tokenizer_config.json", "special_tokens_map.json")
            )
        except OSError as error:
            raise UserError(f"cannot read tokenizer {path}: {error.strerror or error}") from error
        return cls(with_config(model_bytes, merged_config(config, more), name), name)

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether ids are of the same pieces, and texts give the same ids.

        Both formats of a tokenizer may. The texts are `HARD_TEXTS`.
        """
        if self.fingerprint == other.fingerprint:
            return True
        ids = range(min(self.vocab_size, other.vocab_size))  # one may have more special tokens
        ends = self.bos_id == other.bos_id and self.eos_id == other.eos_id
        pieces = ends and all(self.piece(token) == other.piece(token) for token in ids)
        return pieces and all(self.encode(text) == other.encode(text) for text in HARD_TEXTS)

    def save(self, path: epath.PathLike) -> None:
        """Writes the file, of whichever format."""
        epath.Path(path).write_bytes(self.model_bytes)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, without BOS and EOS.

        Args:
          text: any text.
          special: take the names of special tokens in it, such as `</s>`, for these tokens. Never
            for text of others, who could end the turn or the document with it; `protected` keeps
            theirs apart.
        """
        with _unicode(text):
            return self._vocabulary.encode(text, special)

    def encode_text(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text of its own, as the model is to read it: with BOS, or without.

        What says so is the tokenizer, as in transformers; EOS is never added, which would end the
        text before it goes on. Documents to train on begin with BOS and end with EOS anyway.

        Args:
          text: any text.
          special: as `encode`; a BOS that the text begins with is not put there again.
        """
        ids = self.encode(text, special=special)
        written = special and ids[:1] == [self.bos_id]
        return ids if written else [*self.prefix, *ids]

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """As `encode_text`, but never without tokens: BOS alone, if need be."""
        return self.encode_text(text, special=special) or [self.bos_id]

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode` with `special`, and of each token the letters (start, stop) it stands for.

        Of a letter made of several tokens, some may have an empty span at its place.
        """
        with _unicode(text):
            return self._vocabulary.encode_spans(text)

    @functools.cached_property
    def gap(self) -> str:
        """What to write between a special token and a text, so that it is read as one alone is.

        A space, where the tokenizer puts one before a text of its own, but not after `<s>`; LLaMA's
        own code reads such texts apart, and so does what was tuned with it.
        """
        after = self.encode(self.piece(self.bos_id) + "a", special=True)
        return "" if after[1:] == self.encode("a") else " "

    def protected(self, text: str, *, answer: bool = False) -> str:
        """The text, marked so that no part of it is parsed within a text encoded as `special`.

        It stays one text with what stands beside it, so that the ids of a text without names of
        `marker_names` are those without marks. A U+FDD0 of its own is lost.

        Args:
          text: of others.
          answer: it is what the model said: pairs of tags that are not special, such as `<think>`
            and `</think>`, are left, since they are part of answers.
        """
        with _unicode(text):
            return (self._protect_answer if answer else self._protect)(text)

    @functools.cached_property
    def _protect(self) -> Callable[[str], str]:
        return self._protector(self.marker_names)

    @functools.cached_property
    def _protect_answer(self) -> Callable[[str], str]:
        special, names = set(self.special_names), set(self.marker_names)
        tags = {name for name in names - special if re.fullmatch(r"</?[\w-]+>", name)}
        pairs = {tag for tag in tags if {f"<{tag.strip('</>')}>", f"</{tag.strip('</>')}>"} <= tags}
        return self._protector([name for name in self.marker_names if name not in pairs])

    def _protector(self, found: Sequence[str]) -> Callable[[str], str]:
        names = [name for name in found if len(name) > 1]
        starts = re.compile("(?=" + "|".join(map(re.escape, names)) + ")(.)", re.DOTALL)
        # Names that begin or end in the text beside it.
        heads = tuple({name[:cut] for name in names for cut in range(1, len(name))})
        tails = tuple({name[cut:] for name in names for cut in range(1, len(name))})

        def protect(text: str) -> str:
            text = starts.sub(rf"\1{MARK}", text.replace(MARK, ""))
            # Templates strip white space: marks go next to what is left.
            if (body := text.rstrip()).endswith(heads):
                text = body + MARK + text[len(body) :]
            if (body := text.lstrip()).startswith(tails):
                text = text[: len(text) - len(body)] + MARK + body
            if MARK not in text and self._vocabulary.normalizes_to_marker(text):
                text = MARK.join(text)
            return text

        return protect if names else lambda text: text

    @property
    def special_names(self) -> list[str]:
        """How special tokens are written, such as `</s>`."""
        return self._vocabulary.special_names

    @property
    def marker_names(self) -> list[str]:
        """Those, and names of other added tokens that may mark turns: no words, no white space."""
        return self._vocabulary.marker_names

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Token ids of several documents, int32, each from BOS to EOS, in so many threads."""
        return self._vocabulary.encode_documents(texts, threads)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; BOS and EOS add nothing."""
        return self._vocabulary.decode(list(map(int, ids)))

    def piece(self, token: int) -> str:
        """How the tokenizer's file writes one token."""
        return self._vocabulary.piece(int(token))

    def stream(self) -> "TextStream":
        """Decodes token after token."""
        return TextStream(self._vocabulary)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """What each token adds to the text; of a character made of several tokens, the last has it.

        BOS and EOS add nothing, bytes that are no UTF-8 a U+FFFD.
        """
        stream = self.stream()
        found = [stream.add(token) for token in map(int, ids)]
        if found:
            found[-1] += stream.end()
        return found


@contextlib.contextmanager
def _unicode(text: str) -> Iterator[None]:
    """Raises `UserError` where a library fails on a text that is none."""
    try:
        yield
    except Exception as error:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(
                "a text has half of a surrogate pair, or bytes that are not UTF-8, which no "
                "tokenizer reads"
            ) from error
        raise


def _beside(path: epath.Path, name: str) -> dict[str, Any]:
    """The contents of a file in the same folder; empty where it is not there."""
    file = path.parent / name
    if not file.exists():
        return {}
    try:
        return parse_json(file.read_bytes(), name)
    except UserError as error:
        raise UserError(f"tokenizer {path}, or its {name}, is not JSON: {error}") from error


def merged_config(config: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json with special_tokens_map.json, which old ones have beside them.

    As in transformers, one that lists its added tokens needs none.
    """
    return {**config} if "added_tokens_decoder" in config else {**config, **more}


def with_config(model_bytes: bytes, config: Mapping[str, Any], name: str) -> bytes:
    """A tokenizer's file that says itself which tokens its config calls BOS and EOS.

    SentencePiece models say it anyway; Llama 3's file becomes a tokenizer.json where it is others.

    Raises:
      UserError: as `with_bos_eos`.
    """
    if model_bytes.lstrip()[:1] == b"{":
        return with_bos_eos(model_bytes, config, name)
    if not tiktoken_ranks.is_tiktoken(model_bytes):
        return model_bytes
    made = tiktoken_ranks.tokenizer_json(model_bytes, name)
    changed = with_bos_eos(made, config, name)
    return model_bytes if changed == made else changed


class TextStream:
    """Text as its tokens come; a character is held back until it is whole."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begins = False

    def add(self, token: int) -> str:
        """What the token completes."""
        added = self._vocabulary.bytes_of(token)
        if added is None:
            self._begins = token == self._vocabulary.bos_id
            return self.end()
        if self._begins and self._vocabulary.adds_space:
            added = added.removeprefix(b" ")
        self._begins = False
        return self._decoder.decode(added)

    def end(self) -> str:
        """A U+FFFD, if a character is not whole."""
        return self._decoder.decode(b"", final=True)


def _pieces_of(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Cuts documents into lines that SentencePiece takes, up to `limit` bytes in all."""
    taken = 0
    for document in documents:
        for line in document.splitlines(keepends=True):
            # A line is at most 4 bytes a character, so this never exceeds the limit.
            for start in range(0, len(line), MAX_SENTENCE_BYTES // 4):
                piece = line[start : start + MAX_SENTENCE_BYTES // 4].rstrip("\n")
                if piece:
                    yield piece
                    taken += len(piece.encode())
        if taken >= limit:
            return


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, *, sample_bytes: int = SAMPLE_BYTES
) -> Tokenizer:
    """Trains BPE as LLaMA did: digits one by one, bytes for the unknown, whitespace kept.

    Nothing is normalised away, so decoding gives back the very text. Ids: 0 unknown, 1 BOS, 2 EOS,
    then 256 bytes, then pieces. The result depends on the documents alone.

    Args:
      documents: texts; the first `sample_bytes` are used.
      vocab_size: number of ids.
      sample_bytes: UTF-8 bytes of text to learn from.

    Raises:
      UserError: there is no text, or too little for so large a vocabulary.
    """
    pieces = list(_pieces_of(documents, sample_bytes))
    if not pieces:
        raise UserError("there is no text to train a tokenizer on")
    try:
        model = tokenizer_process.train(
            pieces,
            model_type="bpe",
            vocab_size=vocab_size,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            character_coverage=0.99995,
            num_threads=16,  # LLaMA's; BPE training gives the same result for any number
            minloglevel=2,
        )
    except RuntimeError as error:
        # "INTERNAL: file(line) [condition] what is wrong"
        reason = str(error).strip().splitlines()[-1].rsplit("] ", 1)[-1]
        # Its advice names flags that are not ours.
        reason, small, _ = reason.partition(". Increase vocab_size")
        mend = "; raise model.vocab_size, or name a tokenizer by data.tokenizer" if small else ""
        if "too high" in reason:
            mend = " That is data.tokenizer_size: further rows of model.vocab_size are padding"
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} ids on {len(pieces):,} lines: {reason}{mend}"
        ) from error
    return Tokenizer(model)
