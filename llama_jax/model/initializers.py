"""Random initial weights that have the same bits on every mesh.

The numbers of `jax.random.normal` depend on the mesh: the last bit of its inverse error function
depends on how XLA vectorises a device's part of the array. Here a weight is an integer, which is
exact, times one constant.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def normal(std: float) -> nn.initializers.Initializer:
    """Returns an initializer for weights of mean 0 and standard deviation `std`.

    A weight is the sum of eight 16-bit uniform integers, exact in int32, times one constant. Its
    distribution (Irwin-Hall, excess kurtosis -0.15) is normal except for the tails, which end at
    4.9 std.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        words = jax.random.bits(key, (4, *shape), jnp.uint32)
        total = jnp.sum((words >> 16) + (words & 0xFFFF), axis=0, dtype=jnp.uint32)
        centred = total.astype(jnp.int32) - 4 * 0xFFFF
        return centred.astype(dtype) * (std / (8 * (2**32 - 1) / 12) ** 0.5)

    return init


def uniform(bound: float) -> nn.initializers.Initializer:
    """Returns an initializer for uniform weights in [-bound, bound), in steps of 2**-23 bound."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        words = jax.random.bits(key, shape, jnp.uint32)
        centred = (words >> 8).astype(jnp.int32) - 2**23  # 24 bits, exact in float32
        return centred.astype(dtype) * (2**-23 * bound)

    return init
