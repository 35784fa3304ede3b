"""What a source gives and a target takes: a description of the model, then array after array."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from etils import epath

from llama_jax.config import Config, ModelConfig
from llama_jax.errors import UserError
from llama_jax.parameters import present, shape_of

# How a model computes is the run's own choice; everything else is a property of the weights.
_FREE = ("compute_dtype", "attention", "remat", "scan_unroll")


@dataclasses.dataclass(frozen=True)
class Description:
    """All that a checkpoint holds beside its weights.

    Attributes:
      config: the run, or for weights from elsewhere the defaults; with their model, and their
        context as `train.seq_len`.
      dtype: of the stored matrices: bfloat16, float16 or float32; targets cast norms to it.
      files: contents of the tokenizer's files that are there (`tokenizer_files.read_files`).
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


def check_model(source: Source, config: Config) -> None:
    """Checks that the weights of a source are those of the config's model.

    They may have fewer rows for the vocabulary: `padded_vocabulary` adds the others.

    Raises:
      UserError: they are not, with all fields in which they differ.
    """
    found, wanted = source.description.config.model, config.model
    if found.vocab_size < wanted.vocab_size:
        found = dataclasses.replace(found, vocab_size=wanted.vocab_size)
    changed = [
        f"model.{field.name} is {getattr(found, field.name)} there, {getattr(wanted, field.name)} "
        "in the config"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in _FREE and getattr(found, field.name) != getattr(wanted, field.name)
    ]
    if changed:
        raise UserError(f"init_from={config.init_from} is another model: {'; '.join(changed)}")


def refuse_other_base(changed: list[str], config: Config, adapters: epath.PathLike) -> None:
    """Raises UserError if arrays of a base are others than those that adapters were trained on.

    Args:
      changed: names of these arrays.
      config: which says where the base is from.
      adapters: what to call them in the error.
    """
    if not changed:
        return
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    raise UserError(
        f"the adapters of {adapters} were trained on another base than {config.init_from} is "
        f"({changed[0]}{more} differ by fingerprint); name the weights that they belong to by "
        "--config.init_from or --base, or train in another --workdir"
    )


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array, by its path in our tree; of one layer, if it is stacked."""
    return {row.path: shape_of(row.own_axes, model) for row in present(model)}


def paths_and_layers(model: ModelConfig) -> Iterator[tuple[str, int | None]]:
    """Every (path, layer), the layers of one array after another."""
    for row in present(model):
        layers: tuple[int | None, ...] = tuple(range(model.n_layers))
        for layer in layers if row.is_stacked else (None,):
            yield row.path, layer


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
