"""What a source gives and a target takes: a description of the model, then array after array."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from llama_jax.config import Config, ModelConfig
from llama_jax.data import tiktoken_ranks, tokenizer_files
from llama_jax.data.tiktoken_ranks import is_tiktoken
from llama_jax.data.tokenizer import Tokenizer, merged_config, with_config
from llama_jax.errors import UserError
from llama_jax.files import parse_json, read_bytes, refuse_pointer
from llama_jax.step import abstract_state

_GENERATION = "generation_config.json"
# Files beside the weights that travel with them, whatever format lies between.
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    _GENERATION,
)
TOKENIZERS = ("tokenizer.model", "tokenizer.json")
MORE_TEMPLATES = "additional_chat_templates"  # a folder beside chat_template.jinja: NAME.jinja
# Where Meta's repositories at Hugging Face have Llama 3's own file: as tokenizer.model beside the
# weights, other programs would take it for SentencePiece.
ORIGINAL = "original/tokenizer.model"


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
        refuse_pointer(content, f"{folder}/{name}")
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
class Description:
    """All that a checkpoint holds beside its weights.

    Attributes:
      config: the run, or for weights from elsewhere the defaults; with their model, and their
        context as `train.seq_len`.
      dtype: of the stored matrices: bfloat16, float16 or float32; targets cast norms to it.
      files: contents of `TOKENIZER_FILES` that are there, and of `MORE_TEMPLATES`.
      card: Markdown about its training; empty if nothing is known.
      step: optimiser steps taken here.
      notes: lines for the user about what there is, but is not read.
    """

    config: Config
    dtype: str
    files: dict[str, bytes]
    card: str = ""
    step: int = 0
    notes: tuple[str, ...] = ()


def computed_in(config: Config, dtype: str) -> Config:
    """The config with the compute dtype of stored weights; bfloat16 for float16, which it lacks."""
    compute = "float32" if dtype == "float32" else "bfloat16"
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, compute_dtype=compute)
    )


class Source(Protocol):
    """Weights that can be read in any order. Opening one checks all but the numbers."""

    description: Description

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """The array `path` of our tree, for a stacked one that of `layer`."""


class Target(Protocol):
    """Weights that can be written in any order."""

    def write(self, path: str, layer: int | None, array: np.ndarray) -> None:
        """Takes what `Source.read` gave."""

    def close(self) -> None:
        """Completes the files."""


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path in our tree -> shape, of one layer where the array is stacked."""
    return dict(_shapes(model))


@functools.lru_cache(maxsize=8)  # the model is traced for it
def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    params = abstract_state(Config(model=model)).params
    leaves = jax.tree.leaves_with_path(params)
    found = {"/".join(key.key for key in keys): tuple(leaf.shape) for keys, leaf in leaves}
    return {p: shape[1:] if is_stacked(p) else shape for p, shape in found.items()}


def is_norm(path: str) -> bool:
    """Whether the array is the scale of a norm, which does not count for the dtype of a model."""
    return path.endswith("norm")


def is_stacked(path: str) -> bool:
    """Whether the array has a leading axis of layers."""
    return path.startswith("layers/")


def units(model: ModelConfig) -> Iterator[tuple[str, int | None]]:
    """Every (path, layer), the layers of one array after another."""
    for path in shapes(model):
        layers: tuple[int | None, ...] = tuple(range(model.n_layers))
        for layer in layers if is_stacked(path) else (None,):
            yield path, layer


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """The array in another dtype, contiguous.

    Raises:
      UserError: a number is too large for it (float16 ends at 65504).
    """
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, dtype)
    # Most come transposed: a few rows at a time stay in the cache, which is three times as fast.
    with np.errstate(over="ignore"):
        for start in range(0, len(array), 16):
            out[start : start + 16] = array[start : start + 16]
    if np.dtype(dtype) == np.float16 and np.isinf(out).any():
        raise UserError(f"{name} has numbers too large for float16; use --dtype=bfloat16")
    return out


def check_vocabulary(files: Mapping[str, bytes], vocab_size: int, name: str) -> None:
    """Checks that the model has a row for each id of a tokenizer: it may have more (padding).

    Raises:
      UserError: every tokenizer has more ids than that, or one cannot be read.
    """
    tokenizer_files.choose(files, vocab_size, name)


def tokenizer_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Contents of tokenizer_config.json; empty where it is not there.

    Raises:
      UserError: it is damaged.
    """
    return _contents(files, "tokenizer_config.json")


def _contents(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return parse_json(files[name], name) if name in files else {}


def special_names(files: Mapping[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json, with the special_tokens_map.json that old ones have beside them.

    Raises:
      UserError: one of them is damaged.
    """
    return merged_config(tokenizer_config(files), _contents(files, "special_tokens_map.json"))


def adds_bos(files: Mapping[str, bytes], tokenizer: Tokenizer, name: str) -> bool | None:
    """Whether texts begin with BOS, where other files say so than the tokenizer itself; else None.

    As in transformers, a tokenizer.json says it by its post-processor, whatever add_bos_token is;
    of other formats, add_bos_token in tokenizer_config.json does.

    Args:
      files: of the checkpoint.
      tokenizer: that texts are encoded with.
      name: of the checkpoint, for errors.

    Raises:
      UserError: a file is damaged.
    """
    if tokenizer.is_json:
        return None
    if "tokenizer.json" in files:
        with contextlib.suppress(UserError):  # only the other one may be readable here
            return bool(json_tokenizer(files, name).prefix)
    added = tokenizer_config(files).get("add_bos_token")
    if added is not None and type(added) is not bool:
        raise UserError(f"{name}: add_bos_token={added!r} in tokenizer_config.json is not a bool")
    return added


def json_tokenizer(files: Mapping[str, bytes], name: str) -> Tokenizer:
    """The tokenizer.json among files, with the names that its config gives to BOS and EOS.

    Raises:
      UserError: it is damaged, or has neither BOS nor EOS.
    """
    name = f"the tokenizer.json of {name}"
    return Tokenizer(with_config(files["tokenizer.json"], special_names(files), name), name)


def with_base(files: Mapping[str, bytes], base: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files of adapters, and those of their base that they bring none of.

    A template that was learnt goes with the tokenizer that it was learnt with: where the adapters
    have one, the base's templates are left out, and its tokenizer, of which another format may
    put spaces elsewhere: all but how it generates.

    Raises:
      UserError: tokenizer_config.json is damaged.
    """
    learnt = "chat_template.jinja" in files or tokenizer_config(files).get("chat_template")
    kept = base.keys() & {_GENERATION} if learnt else base.keys()
    return {**{name: base[name] for name in kept}, **files}


def special_ids(
    files: Mapping[str, bytes], vocab_size: int | None = None
) -> tuple[int | None, int | list[int] | None]:
    """Ids of BOS and EOS (or of several, such as those of turns and texts) where the files tell.

    Args:
      files: by name.
      vocab_size: rows of the model, which ids must be below; None: not known.

    Raises:
      UserError: generation_config.json is damaged.
    """
    bos, eos = token_ids(_contents(files, _GENERATION), _GENERATION, vocab_size)
    if eos is not None:
        return bos, eos
    model, config = files.get("tokenizer.model", b""), special_names(files)
    tokenizer = None
    if model and not is_tiktoken(model):
        tokenizer = Tokenizer(model)
    elif "tokenizer.json" in files:
        with contextlib.suppress(ValueError):  # it does not say, or cannot be read here
            tokenizer = json_tokenizer(files, "the files")
    elif model:
        tokenizer = Tokenizer(with_config(model, config, "tokenizer.model"))
    return (None, None) if tokenizer is None else (tokenizer.bos_id, tokenizer.eos_id)


def token_ids(
    values: Mapping[str, Any], name: str, vocab_size: int | None = None
) -> tuple[int | None, int | list[int] | None]:
    """`bos_token_id` and `eos_token_id` of a file; None where it has none, which some write as -1.

    Args:
      values: what the file holds.
      name: of the file, for errors.
      vocab_size: as `special_ids`.

    Raises:
      UserError: one is no id, or beyond the rows of the model.
    """

    def checked(key: str, value: Any) -> int | None:
        if value is None or (type(value) is int and value == -1):
            return None
        if type(value) is not int or value < 0:
            given = values[key]
            many = ", nor several" if key == "eos_token_id" else ""
            raise UserError(f"{name}: {key}={given!r} is no token id{many}")
        if vocab_size is not None and value >= vocab_size:
            raise UserError(
                f"{name}: {key} has {value}, but the model's vocabulary is {vocab_size:,}"
            )
        return value

    bos, eos = values.get("bos_token_id"), values.get("eos_token_id")
    if not isinstance(eos, list):
        return checked("bos_token_id", bos), checked("eos_token_id", eos)
    if not eos or None in eos:
        raise UserError(f"{name}: eos_token_id={eos!r} is no token id, nor several")
    found = [checked("eos_token_id", one) for one in eos]
    return checked("bos_token_id", bos), [one for one in found if one is not None] or None
