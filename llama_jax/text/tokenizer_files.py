"""Reads the files of tokenizers, and chooses the tokenizer of a folder that fits its model.

A folder may hold several tokenizers, and some may not fit the model. For example, a model with
32,002 rows may come with the tokenizer.model of its base, with 32,000 ids, and with its own two
tokens in tokenizer.json, added_tokens.json or tokenizer_config.json. The right tokenizer is the one
with the most ids for which the model has rows; the other rows are padding (`vocabulary_size`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from llama_jax.errors import UserError, as_user_error
from llama_jax.files import parse_json, read_bytes, read_json, refuse_lfs_pointer
from llama_jax.text import tiktoken_ranks
from llama_jax.text.saved_tokenizer import holds_tokenizer, read_saved
from llama_jax.text.tiktoken_ranks import is_tiktoken
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_formats import model_proto

MODEL, JSON = "tokenizer.model", "tokenizer.json"
ADDED, CONFIG = "added_tokens.json", "tokenizer_config.json"
# Files next to the weights that are copied with them, into checkpoints of all formats.
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
TOKENIZERS = (MODEL, JSON)
MORE_TEMPLATES = "additional_chat_templates"  # a folder next to chat_template.jinja: NAME.jinja
# The path of Llama 3's own file in Meta's repositories at Hugging Face. Other programs would take a
# tokenizer.model next to the weights for a SentencePiece model.
ORIGINAL = "original/tokenizer.model"
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # types of pieces in sentencepiece_model.proto


def is_tokenizer_file(name: str) -> bool:
    """Returns whether a path is one of `TOKENIZER_FILES`, or a template in `MORE_TEMPLATES`."""
    folder, _, file = name.rpartition("/")
    template = folder == MORE_TEMPLATES and file.endswith(".jinja") and "\\" not in file
    return name in TOKENIZER_FILES or template


def read_files(folder: epath.Path) -> dict[str, bytes]:
    """Reads `TOKENIZER_FILES` and `MORE_TEMPLATES` in a folder, and returns them by name.

    Raises:
      UserError: a file cannot be read.
    """
    files = {
        name: read_bytes(folder / name) for name in TOKENIZER_FILES if (folder / name).exists()
    }
    if "tokenizer.model" not in files and (folder / ORIGINAL).exists():
        content = read_bytes(folder / ORIGINAL)
        if is_tiktoken(content):
            files["tokenizer.model"] = content
    for file in sorted((folder / MORE_TEMPLATES).glob("*.jinja")):
        files[f"{MORE_TEMPLATES}/{file.name}"] = read_bytes(file)
    for name, content in files.items():
        refuse_lfs_pointer(content, f"{folder}/{name}")
    return files


def for_transformers(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Returns the files with a tokenizer.json in place of Llama 3's own format, for transformers.

    Llama 3's own file moves to `ORIGINAL`.

    Raises:
      UserError: that file is damaged.
    """
    model = files.get("tokenizer.model", b"")
    if not is_tiktoken(model):
        return dict(files)
    found = {name: content for name, content in files.items() if name != "tokenizer.model"}
    made = {
        "tokenizer.json": tiktoken_ranks.tokenizer_json(model, "tokenizer.model"),
        "tokenizer_config.json": tiktoken_ranks.config_json(),
    }
    if "tokenizer.json" in files:  # it stays, since it may have other names of special tokens
        del made["tokenizer.json"]
        if "tokenizer_config.json" not in files:
            made["tokenizer_config.json"] = tiktoken_ranks.config_json()
    return {**made, **found, ORIGINAL: model}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the tokenizers of a folder.

    Attributes:
      file: name of its file.
      content: contents of the file, or a SentencePiece model with the tokens that other files add.
      size: all ids are below this number.
      plain: True if `content` is the unchanged file.
    """

    file: str
    content: bytes
    size: int
    plain: bool = True

    def names(self, first: int) -> list[str]:
        """Returns the names of the ids from `first` on."""
        if self.file == JSON:
            names = _json_names(self.content, self.file)
            return [names[number] for number in sorted(names) if number >= first]
        return [Tokenizer(self.content).piece(number) for number in range(first, self.size)]


def fitting(files: Mapping[str, bytes], rows: int | None, name: str) -> Choice | None:
    """Returns the tokenizer with the most ids among those for which the model has enough rows.

    If several have the same number of ids, SentencePiece is preferred, and Llama 3's own format
    comes last.

    Args:
      files: contents of the tokenizer's files, by name.
      rows: rows of the model; None: not known, so every tokenizer fits.
      name: name of the folder in errors.

    Returns:
      The tokenizer; None: no tokenizer fits.

    Raises:
      UserError: a file cannot be read.
    """
    found = [one for one in _choices(files, name) if rows is None or one.size <= rows]
    return max(found, key=lambda one: one.size, default=None)  # the first of several


def choose(files: Mapping[str, bytes], rows: int | None, name: str) -> Choice | None:
    """Returns the tokenizer that fits the model best; see `fitting`.

    Args:
      files: contents of the tokenizer's files, by name.
      rows: rows of the model; None: not known, so every tokenizer fits.
      name: name of the folder in errors.

    Returns:
      The tokenizer; None: there are no tokenizers.

    Raises:
      UserError: all tokenizers have more ids than the model has rows, or a file cannot be read.
    """
    found = fitting(files, rows, name)
    if found or rows is None or not (others := _choices(files, name)):
        return found
    least = min(others, key=lambda one: one.size)
    beyond = least.names(rows)
    listed = ", ".join(map(repr, beyond[:3])) + (" and more" if len(beyond) > 3 else "")
    raise UserError(
        f"{name}/{least.file} has {least.size:,} ids, but the model's vocabulary is {rows:,}: "
        f"{listed or 'the last ids'} have no rows; add rows to the weights (in transformers: "
        f"model.resize_token_embeddings({least.size})), delete these tokens from {least.file}, or "
        "put the model's own tokenizer in its place"
    )


def check_vocabulary(files: Mapping[str, bytes], vocab_size: int, name: str) -> None:
    """Checks that a model has a row for each id of one of its tokenizers; it may have more rows.

    Args:
      files: contents of the tokenizer's files, by name.
      vocab_size: rows of the model.
      name: name of the folder in errors.

    Raises:
      UserError: all tokenizers have more ids than the model has rows, or a file cannot be read.
    """
    choose(files, vocab_size, name)


def _choices(files: Mapping[str, bytes], name: str) -> list[Choice]:
    """Returns all tokenizers in the files, the preferred one first."""
    found: list[Choice] = []
    model = files.get(MODEL, b"")
    tiktoken = bool(model) and is_tiktoken(model)
    if MODEL in files and not tiktoken:
        size = Tokenizer(model, f"{name}/{MODEL}").vocab_size
        found.append(Choice(MODEL, model, size))
    if JSON in files:
        content = files[JSON]
        size = 1 + max(_json_names(content, f"{name}/{JSON}"))
        found.append(Choice(JSON, content, size))
    if tiktoken:
        size = Tokenizer(model, f"{name}/{MODEL}").vocab_size
        found.append(Choice(MODEL, model, size))
    elif MODEL in files:
        found += _with_added(model, found[0].size, files, name)
    return found


def _json_names(content: bytes, name: str) -> dict[int, str]:
    """Returns the tokens of a tokenizer.json by id; does not need the tokenizers library.

    Raises:
      UserError: the file is not a tokenizer.json.
    """
    values = parse_json(content, name)
    try:
        vocab = values["model"]["vocab"]
        # A dict of id by piece (BPE), or a list of pieces and scores (Unigram).
        pieces = (
            vocab.items() if isinstance(vocab, dict) else ((v[0], i) for i, v in enumerate(vocab))
        )
        added = values.get("added_tokens") or ()
        found = {number: piece for piece, number in pieces}
        found |= {token["id"]: str(token.get("content")) for token in added}
        if not found or not all(type(number) is int for number in found):
            raise TypeError
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{name} is not a tokenizer of the tokenizers library") from error
    return found


def _with_added(model: bytes, size: int, files: Mapping[str, bytes], name: str) -> list[Choice]:
    """Returns a SentencePiece model with the tokens that other files add after its own ids.

    Like BOS and EOS, these are control tokens, whose names in a text stay text, unless a file says
    that they are not special.

    Returns:
      A list with one tokenizer; empty if no tokens are added, or if a piece of the model has the
      same name as one of them.

    Raises:
      UserError: a file cannot be read, or gives two tokens the same id.
    """
    added = {number: token for number, token in _added(files, name).items() if number >= size}
    proto = model_proto(model)
    known = {piece.piece for piece in proto.pieces}
    if not added or known & {content for content, _ in added.values()}:
        return []
    if max(added) > size + 2**16:
        raise UserError(f"{name}: the added token {added[max(added)][0]!r} has id {max(added)}")
    for number in range(size, max(added) + 1):
        content, special = added.get(number, (f"<unused_{number}>", True))
        kind = _CONTROL if special else _USER_DEFINED
        proto.pieces.add(piece=content, score=0.0, type=kind if number in added else _UNUSED)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    content = proto.SerializeToString()
    made = Tokenizer(content, f"{name}/{MODEL} with the tokens that {ADDED} or {CONFIG} adds")
    return [Choice(MODEL, content, made.vocab_size, plain=False)]


def _added(files: Mapping[str, bytes], name: str) -> dict[int, tuple[str, bool]]:
    """Returns the tokens in the other files: id -> (name, whether the token is special)."""
    found: dict[int, tuple[str, bool]] = {}
    if ADDED in files:
        with as_user_error(f"{name}/{ADDED}"):
            for content, number in parse_json(files[ADDED], f"{name}/{ADDED}").items():
                _add(found, number, content, True)
    if CONFIG in files:
        with as_user_error(f"{name}/{CONFIG}"):
            values: Any = parse_json(files[CONFIG], f"{name}/{CONFIG}").get("added_tokens_decoder")
            for number, token in (values or {}).items():
                _add(found, int(number), token["content"], bool(token.get("special", True)))
    return found


def _add(found: dict[int, tuple[str, bool]], number: int, content: str, special: bool) -> None:
    if type(number) is not int or number < 0 or type(content) is not str or not content:
        raise TypeError(f"{content!r}: {number!r} is not an added token and its id")
    if found.get(number, (content,))[0] != content:
        raise TypeError(f"{content!r} and {found[number][0]!r} have the same id {number}")
    if any(name == content for other, (name, _) in found.items() if other != number):
        raise TypeError(f"{content!r} has two ids")
    found[number] = (content, special)


def rows_of(folder: epath.Path) -> int | None:
    """Returns the rows of the model in a Hugging Face folder; None: config.json does not say."""
    path = folder / "config.json"
    found = read_json(path).get("vocab_size") if path.exists() else None
    return found if type(found) is int else None


def choose_in(folder: epath.Path) -> Choice | None:
    """Chooses the tokenizer of a Hugging Face folder; None: it has no tokenizer.

    Raises:
      UserError: see `choose`.
    """
    names = (MODEL, JSON, ADDED, CONFIG)
    files = {name: read_bytes(folder / name) for name in names if (folder / name).exists()}
    return choose(files, rows_of(folder), str(folder))


def open_tokenizer(place: epath.PathLike) -> Tokenizer:
    """Opens the tokenizer at a path, such as `data.tokenizer`.

    Args:
      place: the file of a tokenizer, the folder of a saved step, or a Hugging Face folder, whose
        tokenizer that fits the model is taken.

    Raises:
      UserError: the path cannot be read, or is not a tokenizer.
    """
    path, name = epath.Path(place), f"tokenizer {place}"
    try:
        if holds_tokenizer(path):
            return Tokenizer(read_saved(path), name)
        if not path.is_dir():
            return Tokenizer.load(path)
        chosen = choose_in(path)
    except OSError as error:
        raise UserError(f"cannot read tokenizer {path}: {error.strerror or error}") from error
    if chosen is None:
        raise UserError(f"{path} has no tokenizer.model and no tokenizer.json")
    return Tokenizer.load(path / chosen.file) if chosen.plain else Tokenizer(chosen.content, name)
