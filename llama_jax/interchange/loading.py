"""Reads a source straight into sharded arrays, with one array of one layer in memory at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.checkpoint.fingerprint import changed_arrays, fingerprint
from llama_jax.config import Config
from llama_jax.errors import UserError
from llama_jax.interchange import formats
from llama_jax.interchange.formats import Source, refuse_other_base
from llama_jax.interchange.hf import HfSource
from llama_jax.interchange.padded_vocabulary import with_padded_vocabulary
from llama_jax.model.lora import to_frozen
from llama_jax.model.nf4 import NF4
from llama_jax.model.weights import abstract_frozen, abstract_trained
from llama_jax.parameters import PARAMETERS, path_of

Transform = Callable[[str, np.ndarray], Any]


def load(source: Source, targets: Any, shardings: Any, transform: Transform) -> Any:
    """Reads all parameters of a source onto a mesh; all processes must call this.

    A source with `read_part`, such as `hf.HfSource`, reads only what the devices of this process
    hold, except for NF4.

    Args:
      source: weights of a model with the shapes of `targets`.
      targets: shapes and dtypes: a tree like the parameters, whose leaves may be `NF4`.
      shardings: a tree like `targets`.
      transform: (path, array or a part of it) -> the values to store, for example a cast or NF4.
        For NF4 it always gets a whole layer.
    """

    def place(path: Any, target: Any, places: Any) -> Any:
        name = path_of(path)
        if not PARAMETERS[name].is_stacked:
            return _put(source, name, None, target, places, transform)
        piece = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), target)
        piece_places = jax.tree.map(_of_one_layer, places)
        stack = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target),
            out_shardings=places,
        )()
        insert = jax.jit(_insert, donate_argnums=0, out_shardings=places)
        for layer in range(jax.tree.leaves(target)[0].shape[0]):
            part = _put(source, name, layer, piece, piece_places, transform)
            stack = insert(stack, part, np.int32(layer))
        return stack

    return jax.tree.map_with_path(place, targets, shardings, is_leaf=lambda x: isinstance(x, NF4))


def _insert(stack: Any, part: Any, layer: jax.Array) -> Any:
    return jax.tree.map(lambda all, one: all.at[layer].set(one), stack, part)


def _of_one_layer(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _put(
    source: Source, path: str, layer: int | None, target: Any, places: Any, transform: Transform
) -> Any:
    """Reads one array of one layer onto the devices."""
    read_part = getattr(source, "read_part", None)
    if isinstance(target, NF4) or read_part is None:
        kept = transform(path, source.read(path, layer))

        def put(x: np.ndarray, place: Any) -> jax.Array:
            return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

        return jax.tree.map(put, kept, places)
    seen: dict[str, np.ndarray] = {}  # replicas read the same part

    def part(index: Any) -> np.ndarray:
        if str(index) not in seen:
            seen[str(index)] = transform(path, read_part(path, layer, index))
        return seen[str(index)]

    return jax.make_array_from_callback(target.shape, places, part)


def load_init(source: Source, config: Config, shardings: Any) -> Any:
    """Reads the initial weights of a run onto a mesh, one array of one layer after another.

    Args:
      source: a source from `opening.open_init` or `open_base`; adds missing rows of the vocabulary.
      config: config of the run.
      shardings: shardings of the base if the config has adapters, otherwise of the parameters.

    Returns:
      float32 parameters, or the base in its frozen form (`lora.to_frozen`).

    Raises:
      UserError: the weights cannot be read, or are damaged.
    """
    source = with_padded_vocabulary(source, config.model.vocab_size)
    if config.lora.rank:
        targets = abstract_frozen(config)
        return load(source, targets, shardings, lambda path, x: to_frozen(path, x, config.lora))
    targets = abstract_trained(config)
    return load(source, targets, shardings, lambda _, x: x.astype(np.float32))


def check_base(saved: dict[str, int], base: Any, config: Config, folder: epath.Path) -> None:
    """Checks that a base is the one on which the adapters of a checkpoint were trained.

    Args:
      saved: fingerprints of the base, as saved in the checkpoint.
      base: the base that `load_init` returns.
      config: its `init_from` names the base.
      folder: folder of the checkpoint, for the error.

    Raises:
      UserError: the adapters were trained on another base.
    """
    refuse_other_base(changed_arrays(saved, fingerprint(base)), config, folder)


def load_hf(folder: epath.PathLike, config: Config, shardings: Any) -> Any:
    """Reads a Hugging Face folder straight into sharded float32 parameters.

    Each process reads only what its devices hold. Besides the result, one array of one layer is in
    memory.

    Args:
      folder: folder with weights and config.json.
      config: config that the caller expects; `HfSource(folder).description.config` always fits.
      shardings: a tree like the parameters.

    Raises:
      UserError: see `HfSource`; the folder holds another model.
    """
    source = HfSource(folder)
    found, wanted = formats.shapes(source.description.config.model), formats.shapes(config.model)
    layers = source.description.config.model.n_layers
    if found != wanted or layers != config.model.n_layers:
        raise UserError(f"{folder} holds a model of other shapes than this config")

    target = abstract_trained(config)
    return load(source, target, shardings, lambda _, x: x.astype(np.float32))
