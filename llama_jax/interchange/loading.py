"""From a source straight into sharded arrays: one array of one layer is in memory at a time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.config import Config, ModelConfig
from llama_jax.errors import UserError
from llama_jax.interchange.formats import Source, is_stacked
from llama_jax.nf4 import NF4

Keep = Callable[[str, np.ndarray], Any]
# How a model computes is the run's own choice; everything else is a property of the weights.
_FREE = ("compute_dtype", "attention", "remat", "scan_unroll")


def check_model(source: Source, config: Config) -> None:
    """Checks that the weights of a source are those of the config's model.

    Raises:
      UserError: they are not, with all fields in which they differ.
    """
    found, wanted = source.description.config.model, config.model
    changed = [
        f"model.{field.name} is {getattr(found, field.name)} there, {getattr(wanted, field.name)} "
        "in the config"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in _FREE and getattr(found, field.name) != getattr(wanted, field.name)
    ]
    if changed:
        raise UserError(f"init_from={config.init_from} is another model: {'; '.join(changed)}")


def load(source: Source, targets: Any, shardings: Any, keep: Keep) -> Any:
    """Reads all parameters of a source onto a mesh; all processes call it.

    Args:
      source: of a model of these shapes.
      targets: shapes and dtypes: a tree like the parameters, whose leaves may be `NF4`.
      shardings: a tree like `targets`.
      keep: (path, array or a part of it) -> what to keep of it; of NF4 it gets the whole of a
        layer. A source with `read_part`, such as `hf.HfSource`, otherwise reads only what the
        devices of this process hold.
    """

    def place(path: Any, target: Any, places: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not is_stacked(name):
            return _put(source, name, None, target, places, keep)
        piece = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), target)
        piece_places = jax.tree.map(_of_one_layer, places)
        stack = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), target),
            out_shardings=places,
        )()
        insert = jax.jit(_insert, donate_argnums=0, out_shardings=places)
        for layer in range(jax.tree.leaves(target)[0].shape[0]):
            part = _put(source, name, layer, piece, piece_places, keep)
            stack = insert(stack, part, np.int32(layer))
        return stack

    return jax.tree.map_with_path(place, targets, shardings, is_leaf=lambda x: isinstance(x, NF4))


def _insert(stack: Any, part: Any, layer: jax.Array) -> Any:
    return jax.tree.map(lambda all, one: all.at[layer].set(one), stack, part)


def _of_one_layer(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _put(source: Source, path: str, layer: int | None, target: Any, places: Any, keep: Keep) -> Any:
    """One array of one layer, on the devices."""
    read_part = getattr(source, "read_part", None)
    if isinstance(target, NF4) or read_part is None:
        kept = keep(path, source.read(path, layer))

        def put(x: np.ndarray, place: Any) -> jax.Array:
            return jax.make_array_from_callback(x.shape, place, lambda index: x[index])

        return jax.tree.map(put, kept, places)
    seen: dict[str, np.ndarray] = {}  # replicas read the same part

    def part(index: Any) -> np.ndarray:
        if str(index) not in seen:
            seen[str(index)] = keep(path, read_part(path, layer, index))
        return seen[str(index)]

    return jax.make_array_from_callback(target.shape, places, part)
