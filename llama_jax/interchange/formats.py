"""The interfaces of sources and targets: a description of the model, then one array at a time."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
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
    """Everything that a checkpoint holds besides its weights.

    Attributes:
      config: config of the run, or the defaults for imported weights. In both, `model` is the model
        of the weights, and `train.seq_len` their context.
      dtype: dtype of the stored matrices: bfloat16, float16 or float32; targets cast norms to it.
      files: contents of the tokenizer's files, by name (`tokenizer_files.read_files`).
      card: Markdown about the training; empty if nothing is known.
      step: optimiser steps of the run; 0 for imported weights.
      notes: lines for the user about files that exist but are not read.
      seen: how often the weights have seen each source, as in `saved_step.StepMeta`.
    """

    config: Config
    dtype: str
    files: dict[str, bytes]
    card: str = ""
    step: int = 0
    notes: tuple[str, ...] = ()
    seen: Mapping[str, float] = dataclasses.field(default_factory=dict)


def computed_in(config: Config, dtype: str) -> Config:
    """Returns the config with the compute dtype of stored weights; bfloat16 in place of float16."""
    compute = "float32" if dtype == "float32" else "bfloat16"
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, compute_dtype=compute)
    )


class Source(Protocol):
    """Weights that can be read in any order; opening a source checks everything but the values."""

    description: Description

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Reads the array `path` of our tree; of a stacked array, the layer `layer`."""


class Target(Protocol):
    """Weights that can be written in any order."""

    def write(self, path: str, layer: int | None, array: np.ndarray) -> None:
        """Writes an array as `Source.read` returns it.

        Args:
          path: path of the array in our tree.
          layer: index of the layer of a stacked array; None for other arrays.
          array: the array, of one layer if stacked.
        """

    def close(self) -> None:
        """Completes the files."""


def differing_fields(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Returns the names of the fields that make two models different ones."""
    return [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.name not in _FREE and getattr(one, field.name) != getattr(other, field.name)
    ]


def check_model(source: Source, config: Config, accept: Collection[str] = ()) -> None:
    """Checks that the weights of a source fit the config's model.

    They may have fewer rows for the vocabulary: `padded_vocabulary` adds the others.

    Args:
      source: the weights.
      config: the config.
      accept: fields, such as `model.rope_theta`, that may have another value in the config.

    Raises:
      UserError: they do not fit; the message lists all fields that differ.
    """
    changed = {
        name: f"{name} is {was} in the weights, {now} in the config"
        for name, (was, now) in changes_of_model(source, config).items()
        if name not in accept
    }
    if changed:
        rope = not config.lora.rank and all(name.startswith("model.rope_") for name in changed)
        flag = f"; to train on with them, add --accept_changes={','.join(changed)}" if rope else ""
        raise UserError(
            f"init_from={config.init_from} is another model: {'; '.join(changed.values())}{flag}"
        )


def changes_of_model(source: Source, config: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the fields that make the config's model another one than that of the weights.

    Returns:
      By dotted name, the value in the weights and that in the config.
    """
    found, wanted = source.description.config.model, config.model
    if found.vocab_size < wanted.vocab_size:
        found = dataclasses.replace(found, vocab_size=wanted.vocab_size)
    names = differing_fields(found, wanted)
    return {f"model.{name}": (getattr(found, name), getattr(wanted, name)) for name in names}


def refuse_other_base(changed: list[str], config: Config, adapters: epath.PathLike) -> None:
    """Raises `UserError` if arrays of a base differ from those that adapters were trained on.

    Args:
      changed: names of the arrays that differ.
      config: its `init_from` names the base.
      adapters: name of the adapters in the error.
    """
    if not changed:
        return
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    raise UserError(
        f"the adapters of {adapters} were trained on another base than {config.init_from} "
        f"(other fingerprints: {changed[0]}{more}); name the weights that they were trained on "
        "with --config.init_from or --base, or train in another --workdir"
    )


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array by its path in our tree; of a stacked one, of one layer."""
    return {row.path: shape_of(row.own_axes, model) for row in present(model)}


def paths_and_layers(model: ModelConfig) -> Iterator[tuple[str, int | None]]:
    """Yields every (path, layer): one array after another, with all of its layers."""
    for row in present(model):
        layers: tuple[int | None, ...] = tuple(range(model.n_layers))
        for layer in layers if row.is_stacked else (None,):
            yield row.path, layer


def cast(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """Casts an array to a dtype, and makes it contiguous.

    Args:
      array: the array.
      dtype: dtype of the result.
      name: name of the array in the error.

    Raises:
      UserError: a number is too large for float16 (maximum 65504).
    """
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, dtype)
    # Most arrays are transposed views: a few rows at a time fit the cache, three times as fast.
    with np.errstate(over="ignore"):
        for start in range(0, len(array), 16):
            out[start : start + 16] = array[start : start + 16]
    if np.dtype(dtype) == np.float16 and np.isinf(out).any():
        raise UserError(f"{name} has numbers too large for float16; use --dtype=bfloat16")
    return out
