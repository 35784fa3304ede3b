"""Fingerprints of arrays: one number per array, which covers every bit and is equal on every mesh.

The bits of each element are mixed with a hash of its position, and the results are summed modulo
2^32. An integer sum does not depend on the order of its terms, so every sharding gives the same
number. The mixing is a bijection of 32-bit words (the finaliser of MurmurHash3, A. Appleby): a
change of a single element always changes the sum, and any other change does so with a probability
of 1 - 2^-32.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def _mix(x: jax.Array) -> jax.Array:
    """Mixes uint32 words: a bijection in which each input bit flips about half the output bits."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """Returns the bits of `x` as uint32; 8-byte elements give a trailing axis of two words."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def array_fingerprint(x: jax.Array, layer: Any = None) -> jax.Array:
    """Computes the fingerprint of one array, a uint32 scalar; call this under `jit`.

    With `layer`, `x` is that layer of a stack. The fingerprints of all layers add up to that of the
    stack, modulo 2^32.
    """
    words = _words(x)
    # Axis by axis: a linear index into a large stacked weight would not fit 32 bits.
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
    """Returns the fingerprint of each array of a tree, by path, such as `params/layers/attn/wq`.

    Waits until the arrays are computed. The devices read each array once, in place; only the
    result is transferred.
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
    """Fingerprints of arrays that are added one layer at a time, in any order.

    Attributes:
      found: fingerprints of the arrays so far, by path, as `fingerprint` returns them.
    """

    def __init__(self, n_layers: int) -> None:
        self._n_layers = n_layers
        self.found: dict[str, int] = {}
        self._seen: dict[str, set[int | None]] = {}

    def add(self, path: str, layer: int | None, array: Any) -> dict[str, int]:
        """Adds an array, or one layer of it; adding the same one again has no effect.

        Args:
          path: path of the array in our tree.
          layer: index of the layer of a stacked array; None for other arrays.
          array: the numbers, or a tree of parts, such as `NF4`.

        Returns:
          The fingerprints of the array and its parts when its last layer is added; {} before that.
        """
        seen = self._seen.setdefault(path, set())
        if layer in seen:
            return {}
        seen.add(layer)
        names = []
        for keys, x in jax.tree.leaves_with_path(array):
            part = jax.tree_util.keystr(keys, simple=True, separator="/")
            name = f"{path}/{part}" if part else path
            # A device of this process only, whatever mesh is set: the others may not call this.
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
    """Returns a mesh of one device of this process: a CPU, unless JAX may not use it."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = jax.local_devices()[0]
    return Mesh(np.array([device]), ("own",), axis_types=(AxisType.Auto,))


def changed_arrays(saved: Mapping[str, int], found: dict[str, int]) -> list[str]:
    """Returns the names in `found` whose saved fingerprint differs or is missing."""
    return [name for name, value in found.items() if saved.get(name) != value]
