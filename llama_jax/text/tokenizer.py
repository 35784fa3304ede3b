"""Tokenizers: one class for several formats, and training SentencePiece by LLaMA's recipe."""

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

# SentencePiece skips longer "sentences", and reads its sample into memory. Both limits are large
# enough to learn frequent pieces, and keep training on any corpus within minutes.
MAX_SENTENCE_BYTES = 16_384
SAMPLE_BYTES = 64_000_000


class Tokenizer:
    """Turns text into token ids and back: `decode(encode(text)) == text`, except for U+2581.

    SentencePiece itself writes a space as U+2581, so this character is decoded as a space.

    Attributes:
      model_bytes: contents of the file, which show its format.
      fingerprint: sha256 of the file.
      vocab_size: all ids are below this number.
      bos_id: id of the token that begins a text.
      eos_id: id of the token that ends a text.
      prefix: ids that `encode_text` puts before a text: BOS, or nothing.
      is_json: True if the file is a tokenizer.json.
    """

    def __init__(
        self, model_bytes: bytes, name: str = "the tokenizer", *, adds_bos: bool | None = None
    ) -> None:
        """Opens a serialized tokenizer.

        Args:
          model_bytes: contents of a SentencePiece `.model` file, of a `tokenizer.json`, or of Llama
            3's `tokenizer.model`.
          name: name of the tokenizer in errors.
          adds_bos: True if a text begins with BOS; None: the file decides. The post-processor of a
            `tokenizer.json` may add BOS; the other formats always add it.

        Raises:
          UserError: the bytes have none of these formats, or the tokenizer has no BOS or no EOS.
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
        """Reads a `.model` file or a `tokenizer.json`, with the tokenizer_config.json next to it.

        `tokenizer_files.open_tokenizer` also reads folders.

        Raises:
          UserError: the file cannot be read, or is not a tokenizer.
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
        """Returns whether both tokenizers have the same pieces, and give the same ids for texts.

        This may hold for two formats of one tokenizer. The texts are `HARD_TEXTS`.
        """
        if self.fingerprint == other.fingerprint:
            return True
        ids = range(min(self.vocab_size, other.vocab_size))  # one may have more special tokens
        ends = self.bos_id == other.bos_id and self.eos_id == other.eos_id
        pieces = ends and all(self.piece(token) == other.piece(token) for token in ids)
        return pieces and all(self.encode(text) == other.encode(text) for text in HARD_TEXTS)

    def save(self, path: epath.PathLike) -> None:
        """Writes the tokenizer to a file, in its own format."""
        epath.Path(path).write_bytes(self.model_bytes)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the token ids of a text, without BOS and EOS.

        Args:
          text: any text.
          special: True turns the names of special tokens in the text, such as `</s>`, into these
            tokens. Never use it for untrusted text, which could end the turn or the document;
            `protected` marks such parts of a text.
        """
        with _unicode(text):
            return self._vocabulary.encode(text, special)

    def encode_text(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the token ids of a whole text for the model, with BOS if the tokenizer adds it.

        The tokenizer decides about BOS, as in transformers. EOS is never added, since the model is
        to continue the text. Documents to train on always begin with BOS and end with EOS (see
        `encode_documents`).

        Args:
          text: any text.
          special: see `encode`. If the text begins with BOS, no second BOS is added.
        """
        ids = self.encode(text, special=special)
        written = special and ids[:1] == [self.bos_id]
        return ids if written else [*self.prefix, *ids]

    def encode_prompt(self, text: str, *, special: bool = False) -> list[int]:
        """Encodes a prompt; see `encode_text`. An empty result is replaced by BOS alone."""
        return self.encode_text(text, special=special) or [self.bos_id]

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns token ids (see `encode` with `special`), and each token's characters in the text.

        The characters are a range (start, stop). If a character has several tokens, some of them
        may have an empty range at its position.
        """
        with _unicode(text):
            return self._vocabulary.encode_spans(text)

    @functools.cached_property
    def gap(self) -> str:
        """The string to insert between a special token and a text, so that the text keeps its ids.

        The text then has the ids that it has alone. The string is a space if the tokenizer puts a
        space before a text but not after `<s>`, otherwise it is empty. LLaMA's own code encodes
        such texts separately, and models that were tuned with it expect these ids.
        """
        after = self.encode(self.piece(self.bos_id) + "a", special=True)
        return "" if after[1:] == self.encode("a") else " "

    def protected(self, text: str, *, answer: bool = False) -> str:
        """Marks a text so that no part of it is parsed as a token, when encoded with `special`.

        Encoding drops the marks and does not split the text at them: a text without any of
        `marker_names` gets the ids that it would get unmarked. Each U+FDD0 in the text is removed.

        Args:
          text: untrusted text.
          answer: True if the model wrote the text. Pairs of tags that are not special, such as
            `<think>` and `</think>`, then stay unmarked, since they are part of answers.
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
        # The neighbouring text may complete a name that begins or ends in this text.
        heads = tuple({name[:cut] for name in names for cut in range(1, len(name))})
        tails = tuple({name[cut:] for name in names for cut in range(1, len(name))})

        def protect(text: str) -> str:
            text = starts.sub(rf"\1{MARK}", text.replace(MARK, ""))
            # Templates strip white space, so marks are placed next to the remaining text.
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
        """The names of special tokens, such as `</s>`."""
        return self._vocabulary.special_names

    @property
    def marker_names(self) -> list[str]:
        """The names of special tokens, and of other added tokens that may mark turns.

        The latter are neither words nor white space.
        """
        return self._vocabulary.marker_names

    def encode_documents(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Returns the token ids of several documents, int32, each from BOS to EOS."""
        return self._vocabulary.encode_documents(texts, threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids; BOS and EOS add nothing."""
        return self._vocabulary.decode(list(map(int, ids)))

    def piece(self, token: int) -> str:
        """Returns the name of a token in the file of the tokenizer."""
        return self._vocabulary.piece(int(token))

    def stream(self) -> "TextStream":
        """Returns a decoder for one token at a time."""
        return TextStream(self._vocabulary)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """Returns the text that each token adds.

        If a character has several tokens, the last one adds it. BOS and EOS add nothing; bytes that
        are not UTF-8 add U+FFFD.
        """
        stream = self.stream()
        found = [stream.add(token) for token in map(int, ids)]
        if found:
            found[-1] += stream.end()
        return found


@contextlib.contextmanager
def _unicode(text: str) -> Iterator[None]:
    """Raises `UserError` if a library fails because a text is not valid Unicode."""
    try:
        yield
    except Exception as error:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(
                "a text has half of a surrogate pair, or bytes that are not UTF-8, and no "
                "tokenizer can encode it"
            ) from error
        raise


def _beside(path: epath.Path, name: str) -> dict[str, Any]:
    """Reads a JSON file in the same folder; returns {} if there is no such file."""
    file = path.parent / name
    if not file.exists():
        return {}
    try:
        return parse_json(file.read_bytes(), name)
    except UserError as error:
        raise UserError(f"tokenizer {path}, or its {name}, is not JSON: {error}") from error


def merged_config(config: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Merges a tokenizer_config.json with the special_tokens_map.json of an old tokenizer.

    As in transformers, the latter is ignored if the config lists its added tokens.
    """
    return {**config} if "added_tokens_decoder" in config else {**config, **more}


def with_config(model_bytes: bytes, config: Mapping[str, Any], name: str) -> bytes:
    """Returns the file of a tokenizer, changed so that it names the BOS and EOS of its config.

    A SentencePiece model is returned unchanged, since it always names them. Llama 3's file becomes
    a tokenizer.json if the config names other tokens.

    Args:
      model_bytes: contents of the file.
      config: contents of its tokenizer_config.json; may be empty.
      name: name of the tokenizer in errors.

    Raises:
      UserError: see `with_bos_eos`.
    """
    if model_bytes.lstrip()[:1] == b"{":
        return with_bos_eos(model_bytes, config, name)
    if not tiktoken_ranks.is_tiktoken(model_bytes):
        return model_bytes
    made = tiktoken_ranks.tokenizer_json(model_bytes, name)
    changed = with_bos_eos(made, config, name)
    return model_bytes if changed == made else changed


class TextStream:
    """Decodes one token after another; holds back a character until it is complete."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begins = False

    def add(self, token: int) -> str:
        """Adds a token, and returns the text that it completes."""
        added = self._vocabulary.bytes_of(token)
        if added is None:
            self._begins = token == self._vocabulary.bos_id
            return self.end()
        if self._begins and self._vocabulary.adds_space:
            added = added.removeprefix(b" ")
        self._begins = False
        return self._decoder.decode(added)

    def end(self) -> str:
        """Ends the text; returns U+FFFD if its last character is incomplete, otherwise ""."""
        return self._decoder.decode(b"", final=True)


def _pieces_of(documents: Iterable[str], limit: int) -> Iterator[str]:
    """Yields lines that SentencePiece accepts, from as many documents as have `limit` bytes."""
    taken = 0
    for document in documents:
        for line in document.splitlines(keepends=True):
            # A character has at most 4 bytes, so no piece exceeds MAX_SENTENCE_BYTES.
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
    """Trains a BPE tokenizer as LLaMA did.

    Digits are split, unknown characters become bytes, and white space is kept. Texts are not
    normalised, so decoding returns exactly the text. Ids: 0 unknown, 1 BOS, 2 EOS, then 256 bytes,
    then pieces. The result depends only on the arguments.

    Args:
      documents: texts; those after the first `sample_bytes` are not used.
      vocab_size: number of ids.
      sample_bytes: UTF-8 bytes of text to learn from; the last document is used as a whole.

    Raises:
      UserError: there is no text, or too little text for this vocabulary size.
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
            num_threads=16,  # as LLaMA; the result of BPE training does not depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        # The message has the form "INTERNAL: file(line) [condition] what is wrong".
        reason = str(error).strip().splitlines()[-1].rsplit("] ", 1)[-1]
        # The library's advice names its own flags, which are not fields of our config.
        reason, small, _ = reason.partition(". Increase vocab_size")
        mend = "; raise model.vocab_size, or set data.tokenizer" if small else ""
        if "too high" in reason:
            mend = " Set data.tokenizer_size; the other rows of model.vocab_size are padding"
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} ids on {len(pieces):,} lines: {reason}{mend}"
        ) from error
    return Tokenizer(model)
