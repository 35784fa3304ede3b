"""What a source gives and a target takes: a description of the model, then array after array."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from llama_jax.config import Config, ModelConfig
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.vocabularies import with_ends
from llama_jax.errors import UserError
from llama_jax.step import abstract_state

_GENERATION = "generation_config.json"
# Files beside the weights that travel with them, whatever format lies between.
TOKENIZER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    _GENERATION,
)
MORE_TEMPLATES = "additional_chat_templates"  # a folder beside chat_template.jinja: NAME.jinja
LLAMA3_SPECIAL_TOKENS = 256  # that follow the ranks in a tokenizer.model of Llama 3


def is_tokenizer_file(name: str) -> bool:
    """Whether a name is in `TOKENIZER_FILES`, or a template in `MORE_TEMPLATES`; no other path."""
    folder, _, file = name.rpartition("/")
    template = folder == MORE_TEMPLATES and file.endswith(".jinja") and "\\" not in file
    return name in TOKENIZER_FILES or template


@dataclasses.dataclass(frozen=True)
class Description:
    """All that a checkpoint holds beside its weights.

    Attributes:
      config: the run, or for weights from elsewhere the defaults; with their model, and their
        context as `train.seq_len`.
      dtype: of the stored weights: bfloat16, float16 or float32.
      files: contents of `TOKENIZER_FILES` that are there, and of `MORE_TEMPLATES`.
      card: Markdown about its training; empty if nothing is known.
      step: optimiser steps taken here.
    """

    config: Config
    dtype: str
    files: dict[str, bytes]
    card: str = ""
    step: int = 0


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


def check_vocabulary(files: dict[str, bytes], vocab_size: int, name: str) -> None:
    """A tokenizer may have fewer ids than the model has rows (padding), but not more.

    Raises:
      UserError: it has more, or cannot be read.
    """
    for file in ("tokenizer.model", "tokenizer.json"):
        if file not in files:
            continue
        size = _vocabulary(files[file], f"{name}/{file}")
        if size > vocab_size:
            raise UserError(
                f"{name}/{file} has {size:,} ids, but the model's vocabulary is {vocab_size:,}"
            )


def _vocabulary(content: bytes, name: str) -> int:
    if name.endswith(".json"):
        try:
            tokenizer = json.loads(content)
            vocab = tokenizer["model"]["vocab"]
            # A dict of id by piece (BPE), or a list of pieces (Unigram).
            largest = max(vocab.values()) if isinstance(vocab, dict) else len(vocab) - 1
            return 1 + max([largest, *(token["id"] for token in tokenizer["added_tokens"])])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{name} is not a tokenizer of the tokenizers library") from error
    if is_tiktoken(content):
        return len(content.splitlines()) + LLAMA3_SPECIAL_TOKENS
    return Tokenizer(content, name).vocab_size


def is_tiktoken(content: bytes) -> bool:
    """Whether a tokenizer.model is Llama 3's (lines of base64 and rank), not SentencePiece."""
    words = content[:1000].split(b"\n")[0].split()
    return len(words) == 2 and words[1].isdigit()


def tokenizer_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Contents of tokenizer_config.json; empty where it is not there, or no mapping.

    Raises:
      UserError: it is damaged.
    """
    try:
        values = json.loads(files.get("tokenizer_config.json", b"{}"))
    except ValueError as error:
        raise UserError(f"tokenizer_config.json is not valid JSON: {error}") from error
    return values if isinstance(values, dict) else {}


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


def special_ids(files: Mapping[str, bytes]) -> tuple[int | None, int | list[int] | None]:
    """Ids of BOS and EOS (or of several, such as those of turns and texts) where the files tell.

    Raises:
      UserError: generation_config.json is damaged.
    """
    if "generation_config.json" in files:
        try:
            values = json.loads(files["generation_config.json"])
            eos = values.get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise UserError("generation_config.json is not valid JSON, or no mapping") from error
        many = eos if isinstance(eos, list) else [eos]
        if not many or not all(type(token) is int for token in many if eos is not None):
            raise UserError(
                f"generation_config.json: eos_token_id={eos!r} is no token id, nor several"
            )
        if eos is not None:
            return values.get("bos_token_id"), eos
    model = files.get("tokenizer.model", b"")
    if model and not is_tiktoken(model):
        tokenizer = Tokenizer(model)
        return tokenizer.bos_id, tokenizer.eos_id
    if "tokenizer.json" in files:
        config = tokenizer_config(files)
        with contextlib.suppress(ValueError):  # it does not say, or cannot be read here
            content = with_ends(files["tokenizer.json"], config, "tokenizer.json")
            tokenizer = Tokenizer(content)
            return tokenizer.bos_id, tokenizer.eos_id
    return None, None
