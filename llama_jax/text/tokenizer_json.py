"""Hugging Face's `tokenizer.json`, and the tokens that its `tokenizer_config.json` adds."""

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.errors import UserError, as_user_error, first_line
from llama_jax.files import parse_json
from llama_jax.text import tokenizer_parts
from llama_jax.text.tokenizer_formats import MARK, SPACE, byte_of_letter, is_marker

# If no file names BOS and EOS, they are the first of these names among the added tokens. A piece of
# such a name that is not an added token is not BOS or EOS: it encodes texts that contain the name.
BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|endoftext|>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>")
# Our own key in a tokenizer.json, for the tokens that only tokenizer_config.json names. Its value:
# {"bos": NAME, "eos": NAME, "added": [token, ...]}.
ENDS = "llama_jax"
# A post-processor would add special tokens, which templates write themselves, and would remove
# spaces from the spans of tokens.
_NOTHING_ADDED: dict[str, Any] = {"post_processor": None}
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


_ALTERNATIVE = re.compile(r"(?:\\.|[^\\|])+")  # one alternative of a regular expression


class _NoEnds(UserError):
    """A tokenizer.json lacks a token; the message is a predicate, without the name of the file."""


def _whole(described: str) -> Any:
    """Loads a tokenizer of the library, without truncation and padding, which the file may set."""
    import tokenizers

    found = tokenizers.Tokenizer.from_str(described)
    found.no_truncation()
    found.no_padding()
    return found


class TokenizerJson:
    """A `tokenizer.json`: LLaMA-3's byte-level BPE, or a SentencePiece model in this format."""

    def __init__(self, model_bytes: bytes, name: str) -> None:
        """Parses a `tokenizer.json`.

        Raises:
          UserError: the file is not a tokenizer.json, or its BOS or EOS is not known.
        """
        self._name = name
        try:
            described = parse_json(model_bytes, "it")
            if "model" not in described and {"vocab", "config"} <= described.keys():
                raise UserError(
                    "it is a tekken file of Mistral's; use the tokenizer.json of the same model"
                )
            ends = described.pop(ENDS, {})
            self._json = json.dumps(described)
            self._tokenizer = _whole(self._json)
            self._complete(ends)
        except ImportError as error:
            raise UserError(
                f"{name} is a tokenizer.json, which the tokenizers library reads: "
                "pip install 'llama_jax[hf]'"
            ) from error
        except _NoEnds as error:
            raise UserError(f"{name} {error}") from error
        except BaseException as error:  # the library raises a plain Exception, or panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{name} is not a tokenizer.json: {first_line(error)}") from error
        kinds = {one.get("type") for one in tokenizer_parts.decoders(described.get("decoder"))}
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds

    def _complete(self, ends: dict[str, Any]) -> None:
        """Adds the tokens that `with_bos_eos` has written, and finds BOS and EOS."""
        import tokenizers

        tokenizer = self._tokenizer
        for token in ends.get("added", ()):
            flags = {key: value for key, value in token.items() if key in _FLAGS}
            tokenizer.add_tokens([tokenizers.AddedToken(**flags)])
            if tokenizer.token_to_id(token["content"]) != token["id"]:
                raise _NoEnds(
                    f"has another id for {token['content']!r} than tokenizer_config.json says"
                )
        example = tokenizer.encode("a")
        marked = zip(example.ids, example.special_tokens_mask, strict=True)
        self.prefix = tuple(one for one, _ in itertools.takewhile(lambda pair: pair[1], marked))
        begins = [tokenizer.id_to_token(token) for token in self.prefix[:1]]
        self.bos_id = self._end(ends.get("bos"), (*begins, *BOS_NAMES))
        self.eos_id = self._end(ends.get("eos"), EOS_NAMES)
        known = tokenizer.get_added_tokens_decoder()
        special = {token for token, one in known.items() if one.special}
        for token in {self.bos_id, self.eos_id} - special:
            content = tokenizer.id_to_token(token)
            tokenizer.add_special_tokens([tokenizers.AddedToken(content, normalized=False)])
        if ends.get("added") or not special >= {self.bos_id, self.eos_id}:
            self._json = tokenizer.to_str()
        self._added = tokenizer.get_added_tokens_decoder()
        tokenizer.encode_special_tokens = True  # names of special tokens in a text stay text
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.adds_space = self._pieces("a").startswith(SPACE)

    def _end(self, given: str | None, known: Sequence[str]) -> int:
        """Returns the id of BOS or EOS.

        Args:
          given: its name; None: the first name in `known` of an added token.
          known: usual names, best first.

        Raises:
          _NoEnds: there is no such token.
        """
        tokenizer = self._tokenizer
        if given is not None:
            found = tokenizer.token_to_id(given)
            if found is None:
                raise _NoEnds(f"has no token {given!r}, which tokenizer_config.json names")
            return found
        added = tokenizer.get_added_tokens_decoder()
        for special in (True, False):
            of_name = {one.content: at for at, one in added.items() if one.special == special}
            found = next((of_name[name] for name in known if name in of_name), None)
            if found is not None:
                return found
        piece = next((name for name in known if tokenizer.token_to_id(name) is not None), None)
        but = "" if piece is None else f" ({piece!r} is an ordinary piece, not an added token)"
        raise _NoEnds(
            f"has no BOS or no EOS token of a known name{but}; put the tokenizer_config.json that "
            "names them next to it"
        )

    def _pieces(self, text: str) -> str:
        return "".join(self._tokenizer.encode(text, add_special_tokens=False).tokens)

    @functools.cached_property
    def special_names(self) -> list[str]:
        """The names of special tokens."""
        return [token.content for token in self._added.values() if token.special]

    @functools.cached_property
    def marker_names(self) -> list[str]:
        """The names of special tokens, and of other tokens that may mark turns."""
        added = self._added.values()
        return [
            *(one.content for one in added if one.special or is_marker(one.content)),
            *filter(is_marker, self._cut_names),
        ]

    def normalizes_to_marker(self, text: str) -> bool:
        """Returns whether normalization makes a marker; see `Vocabulary.normalizes_to_marker`."""
        markers = set(self.marker_names)
        names = [one.content for one in self._added.values() if one.normalized]
        if self._tokenizer.normalizer is None or markers.isdisjoint(names):
            return False
        normal = self._tokenizer.normalizer.normalize_str(text)
        return any(name in normal for name in markers.intersection(names))

    @functools.cached_property
    def _normalized_markers(self) -> dict[str, int]:
        """The ids of markers that are found only after normalization, which removes marks."""
        added = {
            one.content: token
            for token, one in self._added.items()
            if one.normalized and not one.special and is_marker(one.content)
        }
        cut = {name: self._tokenizer.token_to_id(name) for name in self._cut_names}
        return added | {name: token for name, token in cut.items() if is_marker(name)}

    @functools.cached_property
    def _cut_names(self) -> list[str]:
        """The pieces that the pre-tokenizer splits out of a text by name.

        In files that this package writes, they are the user-defined pieces of SentencePiece.
        """
        for pattern in tokenizer_parts.split_patterns(json.loads(self._json).get("pre_tokenizer")):
            names = [re.sub(r"\\(.)", r"\1", one) for one in _ALTERNATIVE.findall(pattern)]
            if all(self._tokenizer.token_to_id(name) is not None for name in names):
                return names
        return []

    @functools.cached_property
    def _parsing(self) -> Any:
        """The same tokenizer, which also parses the names of special tokens in a text."""
        return _whole(json.dumps({**json.loads(self._json), **_NOTHING_ADDED}))

    def _dropping_marks(self, described: dict[str, Any], left_out: Container[str] = ()) -> Any:
        """Returns a tokenizer that removes marks from the text between the tokens that it finds.

        Args:
          described: contents of a tokenizer.json, which this changes.
          left_out: names of added tokens to remove.
        """
        drop = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
        rest = [described["normalizer"]] if described.get("normalizer") else []
        described["normalizer"] = {"type": "Sequence", "normalizers": [drop, *rest]}
        tokens = described.get("added_tokens") or []
        described["added_tokens"] = [one for one in tokens if one["content"] not in left_out]
        for token in described["added_tokens"]:
            if token["special"]:  # otherwise its name is found again when the marks are removed
                token["normalized"] = False
        return _whole(json.dumps(described))

    @functools.cached_property
    def _parsing_marked(self) -> Any:
        return self._dropping_marks(json.loads(self._json) | _NOTHING_ADDED)

    @functools.cached_property
    def _plain_marked(self) -> Any:
        described = tokenizer_parts.without_space(json.loads(self._json)) | _NOTHING_ADDED
        if self._cut_names:
            described["model"]["ignore_merges"] = False
        return self._dropping_marks(described, self._normalized_markers)

    def encode(self, text: str, special: bool) -> list[int]:
        """Encodes a text; see `Vocabulary.encode`."""
        if special:
            return self.encode_spans(text)[0]
        return self._encoded(self._tokenizer, text).ids

    def _encoded(self, tokenizer: Any, text: str) -> Any:
        with self._reading():
            return tokenizer.encode(text, add_special_tokens=False)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the library raises a plain Exception
            raise UserError(f"{self._name} cannot read a text: {first_line(error)}") from error

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encodes a text with special tokens; see `Vocabulary.encode_spans`."""
        if MARK not in text:
            found = self._encoded(self._parsing, text)
            return found.ids, found.offsets
        # A text after a mark would not count as the beginning, and would get no space before it.
        skipped = len(text) - len(text.lstrip(MARK))
        text = text[skipped:]
        found = self._encoded(self._parsing_marked, text)
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        markers = set(self._normalized_markers.values())
        for token, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if token in markers and MARK in text[start:stop]:  # this name must stay text
                again = self._encoded(self._plain_marked, text[start:stop])
                ids += again.ids
                spans += [(start + first, start + last) for first, last in again.offsets]
            else:
                ids.append(token)
                spans.append((start, stop))
        return ids, [(skipped + start, skipped + stop) for start, stop in spans]

    def encode_documents(self, texts: Sequence[str], threads: int) -> list[np.ndarray]:
        """Encodes several texts, each from BOS to EOS.

        With `threads` above 1, the library chooses the number of threads.
        """
        if threads == 1:  # without the library's thread pool, which does not survive a fork
            rows = [self.encode(text, False) for text in texts]
        else:
            with self._reading():
                found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            rows = [one.ids for one in found]
        return [np.array([self.bos_id, *row, self.eos_id], np.int32) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """Returns the name of a token in the file; "" for an id that has no token."""
        return self._tokenizer.id_to_token(token) or ""

    def bytes_of(self, token: int) -> bytes | None:
        """Returns the bytes that a token adds to the text; see `Vocabulary.bytes_of`."""
        if token in self._added:
            added = self._added[token]
            return None if added.special else added.content.encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return None
        if self._byte_level:
            letters = byte_of_letter()
            if all(letter in letters for letter in piece):
                return bytes(letters[letter] for letter in piece)
            return piece.encode()  # as the library decodes a piece with other characters
        if self._byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


def bos_eos_names(config: Mapping[str, Any], name: str) -> dict[str, str]:
    """Returns the names of BOS and EOS in a `tokenizer_config.json`, with the keys "bos" and "eos".

    Raises:
      UserError: a token is neither text nor an object with its text.
    """
    found = {}
    for end in ("bos", "eos"):
        token = config.get(f"{end}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise UserError(f"{name}: {end}_token={config[f'{end}_token']!r} is not a token")
        if token is not None:
            found[end] = token
    return found


def _config_tokens(config: Mapping[str, Any], described: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the added tokens of a tokenizer_config.json that its tokenizer.json lacks, by id.

    They include tokens that only the config calls special.
    """
    known = {one["content"]: one["special"] for one in described.get("added_tokens") or ()}
    given = config.get("added_tokens_decoder") or {}
    tokens = [{**token, "id": int(number)} for number, token in given.items()]
    missing = [
        one for one in tokens if known.get(one["content"]) not in (True, one.get("special", False))
    ]
    return sorted(missing, key=lambda one: one["id"])


def with_bos_eos(model_bytes: bytes, config: Mapping[str, Any], name: str) -> bytes:
    """Returns a tokenizer.json, changed so that it names the BOS and EOS of its config.

    It is returned unchanged if `TokenizerJson` finds the same tokens without the config. If the
    config names only EOS (as Qwen's does), and there is no BOS with a known name, EOS becomes BOS,
    too.

    Args:
      model_bytes: contents of the tokenizer.json.
      config: contents of its tokenizer_config.json; may be empty.
      name: name of the tokenizer in errors.

    Raises:
      UserError: the file is not a tokenizer.json, or the config is malformed.
    """
    if not any(config.get(key) for key in ("bos_token", "eos_token", "added_tokens_decoder")):
        return model_bytes
    try:
        described = parse_json(model_bytes, "it")
    except UserError as error:
        raise UserError(f"{name} is not a tokenizer.json: {error}") from error
    beside = "its tokenizer_config.json"
    with as_user_error(f"{name}, or {beside},"):
        ends = bos_eos_names(config, beside)
        added = _config_tokens(config, described)
    try:
        found = TokenizerJson(model_bytes, name)
        same = all(found.piece(getattr(found, f"{end}_id")) == ends[end] for end in ends)
        if same and not added:
            return model_bytes
    except UserError:
        if not ends and not added:
            return model_bytes
    more = {**ends, **({"added": added} if added else {})}
    made = json.dumps({ENDS: more, **described}).encode()
    if "eos" in ends and "bos" not in ends:
        try:
            TokenizerJson(made, name)
        except UserError:
            made = json.dumps({ENDS: {"bos": ends["eos"], **more}, **described}).encode()
    return made


def without_bos_eos(model_bytes: bytes) -> bytes:
    """Undoes `with_bos_eos`: returns the tokenizer.json that other programs read."""
    described = parse_json(model_bytes, "the tokenizer")
    if ENDS not in described:
        return model_bytes
    del described[ENDS]
    return json.dumps(described).encode()
