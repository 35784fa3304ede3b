"""The files of tokenizers: which they are, and which tokenizer of a folder is its model's.

Folders hold several tokenizers, and not all of them fit.

A model of 32,002 rows may come with the tokenizer.model of 32,000 ids that it was made from, and
with its own two tokens in tokenizer.json, added_tokens.json or tokenizer_config.json. The right one
has the most ids for which the model has rows; the rows that are left are padding
(`vocabulary_size`).
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
# Files beside the weights that travel with them, whatever format lies between.
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
TOKENIZERS = (MODEL, JSON)
MORE_TEMPLATES = "additional_chat_templates"  # a folder beside chat_template.jinja: NAME.jinja
# Where Meta's repositories at Hugging Face have Llama 3's own file: as tokenizer.model beside the
# weights, other programs would take it for SentencePiece.
ORIGINAL = "original/tokenizer.model"
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # of sentencepiece_model.proto


def is_tokenizer_file(name: str) -> bool:
    """Whether a name is in `TOKENIZER_FILES`, or a template in `MORE_TEMPLATES`; no other path."""
    folder, _, file = name.rpartition("/")
    template = folder == MORE_TEMPLATES and file.endswith(".jinja") and "\\" not in file
    return name in TOKENIZER_FILES or template


def read_files(folder: epath.Path) -> dict[str, bytes]:
    """Contents of `TOKENIZER_FILES` in a folder, and of `MORE_TEMPLATES`.

    Raises:
      UserError: one cannot be read.
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
    """The files as transformers reads them: with a tokenizer.json in place of Llama 3's own format.

    Raises:
      UserError: that is damaged.
    """
    model = files.get("tokenizer.model", b"")
    if not is_tiktoken(model):
        return dict(files)
    found = {name: content for name, content in files.items() if name != "tokenizer.model"}
    made = {
        "tokenizer.json": tiktoken_ranks.tokenizer_json(model, "tokenizer.model"),
        "tokenizer_config.json": tiktoken_ranks.config_json(),
    }
    if "tokenizer.json" in files:  # which may have names of its own
        del made["tokenizer.json"]
        if "tokenizer_config.json" not in files:
            made["tokenizer_config.json"] = tiktoken_ranks.config_json()
    return {**made, **found, ORIGINAL: model}


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of the tokenizers of a folder.

    Attributes:
      file: that it is in.
      content: of the file; or a SentencePiece model with the tokens that other files add to it.
      size: all ids are below it.
      plain: whether `content` is the file as it is.
    """

    file: str
    content: bytes
    size: int
    plain: bool = True

    def names(self, first: int) -> list[str]:
        """What the tokenizer calls its ids from `first` on."""
        if self.file == JSON:
            names = _json_names(self.content, self.file)
            return [names[number] for number in sorted(names) if number >= first]
        return [Tokenizer(self.content).piece(number) for number in range(first, self.size)]


def fitting(files: Mapping[str, bytes], rows: int | None, name: str) -> Choice | None:
    """The tokenizer with the most ids for which the model has rows; None: there is none.

    Where two have as many, SentencePiece is preferred, and Llama 3's own format comes last.

    Args:
      files: contents of the tokenizer's files, by name.
      rows: of the model; None: not known.
      name: of the folder, for errors.

    Raises:
      UserError: one cannot be read.
    """
    found = [one for one in _choices(files, name) if rows is None or one.size <= rows]
    return max(found, key=lambda one: one.size, default=None)  # the first of several


def choose(files: Mapping[str, bytes], rows: int | None, name: str) -> Choice | None:
    """As `fitting`; None: there is no tokenizer at all.

    Raises:
      UserError: all have more ids than the model has rows, or one cannot be read.
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
        "put the model's own tokenizer there"
    )


def check_vocabulary(files: Mapping[str, bytes], vocab_size: int, name: str) -> None:
    """Checks that the model has a row for each id of a tokenizer: it may have more (padding).

    Raises:
      UserError: every tokenizer has more ids than that, or one cannot be read.
    """
    choose(files, vocab_size, name)


def _choices(files: Mapping[str, bytes], name: str) -> list[Choice]:
    """All tokenizers of the files, the preferred one first."""
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
    """The tokens of a tokenizer.json by id; the library that reads it need not be there.

    Raises:
      UserError: it is not a tokenizer.json.
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
    """A SentencePiece model with the tokens that the other files give ids behind its own.

    Their names are never read in a text of others, as those of BOS and EOS are not, unless a file
    says that they are not special.

    Returns:
      One, or none: nothing is added, or a piece of the model has the same name.

    Raises:
      UserError: a file cannot be read, or gives two tokens one id.
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
    """Tokens that are beside the vocabulary: id -> (how it is written, whether it is special)."""
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
    """Rows of the model of a Hugging Face folder, by its config.json; None: it does not tell."""
    path = folder / "config.json"
    found = read_json(path).get("vocab_size") if path.exists() else None
    return found if type(found) is int else None


def choose_in(folder: epath.Path) -> Choice | None:
    """The tokenizer of a Hugging Face folder.

    Raises:
      UserError: as `choose`.
    """
    names = (MODEL, JSON, ADDED, CONFIG)
    files = {name: read_bytes(folder / name) for name in names if (folder / name).exists()}
    return choose(files, rows_of(folder), str(folder))


def open_tokenizer(place: epath.PathLike) -> Tokenizer:
    """Reads the tokenizer that a path stands for, as `data.tokenizer` names it.

    Args:
      place: a tokenizer's file, a folder of Hugging Face, of whose tokenizers the one that fits the
        model is taken, or the folder of a saved step.

    Raises:
      UserError: it cannot be read, or is none.
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
