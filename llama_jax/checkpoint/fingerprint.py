"""A fingerprint of a state: one number per array, the same on every mesh, of every bit of it.

Each element's bits are mixed with a hash of its position, and the results are added up modulo 2^32.
Integer sums don't depend on the order of their terms, so that any sharding gives the same number;
the mixing is a bijection of 32-bit words (the finaliser of MurmurHash3, A. Appleby), so that any
change of a single element changes it for sure, and any other change but for a chance of 2^-32.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit of the input moves about half of the output's."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32; 8-byte elements give a trailing axis of two words."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def array_fingerprint(x: jax.Array, layer: Any = None) -> jax.Array:
    """The fingerprint of one array: a uint32 scalar, to be computed under `jit`.

    With `layer`, `x` is that layer of a stack: the sum of all layers' is the stack's.
    """
    words = _words(x)
    # Axis by axis: a linear index of a large stacked weight would not fit 32 bits.
    position = jnp.full((), 0x9E3779B9, jnp.uint32)
    if layer is not None:
        position = _mix(position * np.uint32(5) + jnp.asarray(layer, jnp.uint32))
    for size in words.shape:
        position = _mix(position[..., None] * np.uint32(5) + jnp.arange(size, dtype=jnp.uint32))
    return jnp.sum(_mix(words ^ position), dtype=jnp.uint32)


@functools.lru_cache(maxsize=8)
def _program(replicated: NamedSharding | None) -> Any:
    def state_fingerprint(leaves: list[jax.Array]) -> jax.Array:
        return jnp.stack([array_fingerprint(leaf) for leaf in leaves])

    return jax.jit(state_fingerprint, out_shardings=replicated)


def fingerprint(tree: Any) -> dict[str, int]:
    """Fingerprints of all arrays of a tree, by path, such as `params/layers/attn/wq`.

    Waits for the arrays; reads each once, where it is, and moves nothing but the result.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    arrays = [leaf for _, leaf in leaves]
    sharding = arrays[0].sharding
    # Every process must be able to read the result.
    replicated = (
        NamedSharding(sharding.mesh, PartitionSpec())
        if isinstance(sharding, NamedSharding)
        else None
    )
    values = jax.device_get(_program(replicated)(arrays))
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves)
    return dict(zip(names, map(int, values), strict=True))


class LayerPrints:
    """Fingerprints of arrays that come one layer at a time, in any order.

    Attributes:
      found: of the arrays so far, by path, as `fingerprint` gives them.
    """

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers
        self.found: dict[str, int] = {}
        self._seen: dict[str, set[int | None]] = {}

    def add(self, path: str, layer: int | None, array: Any) -> dict[str, int]:
        """Adds an array, or one layer of it; again, it changes nothing.

        Args:
          path: of the array in our tree.
          layer: of a stacked array; else None.
          array: its numbers, or a tree of parts, such as `NF4`.

        Returns:
          The fingerprints of the array and its parts when its last layer has come, else nothing.
        """
        seen = self._seen.setdefault(path, set())
        if layer in seen:
            return {}
        seen.add(layer)
        names = []
        for keys, x in jax.tree.leaves_with_path(array):
            part = jax.tree_util.keystr(keys, simple=True, separator="/")
            name = f"{path}/{part}" if part else path
            # On this process's own device: others need not come here, whatever mesh is set.
            with jax.set_mesh(_own_mesh()):
                value = int(_layer_program()(x, layer))
            self.found[name] = (self.found.get(name, 0) + value) % 2**32
            names.append(name)
        whole = layer is None or len(seen) == self._n_layers
        return {name: self.found[name] for name in names} if whole else {}


@functools.cache
def _layer_program() -> Any:
    return jax.jit(array_fingerprint)


@functools.cache
def _own_mesh() -> Mesh:
    """One device of this process: the CPU, if JAX has been left it."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    return Mesh(np.array([device]), ("own",), axis_types=(AxisType.Auto,))


def changed_arrays(saved: Mapping[str, int], found: dict[str, int]) -> list[str]:
    """Names of the arrays of `found` whose fingerprint is not the saved one, or was not saved."""
    return [name for name, value in found.items() if saved.get(name) != value]
