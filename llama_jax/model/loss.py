"""Next-token cross-entropy that never holds all logits at once.

With LLaMA's vocabulary of 32,000 the float32 logits of one 2048-token sequence take 262 MB, and
their gradient takes the same again. So the sequence is cut into chunks, and the forward pass
computes the gradient of each chunk while its logits exist. This takes three matrix products per
chunk, as the plain form does, and recomputes nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax.model.linear import unembed, unembed_gradients
from llama_jax.parallel.sharding import activation_spec, constrain, mesh_axes
from llama_jax.parameters import PARAMETERS

# Objective, cross-entropy and weight: scalars, summed over tokens.
Sums = tuple[jax.Array, jax.Array, jax.Array]


def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> Sums:
    """Computes the weighted sum of -log p(target), in float32.

    Args:
      hidden_BTD: last hidden states.
      head_DV: output matrix; logits are `hidden_BTD @ head_DV`.
      targets_BT: the token that follows each position.
      weights_BT: weight of each position, 0 on padding. It gets no gradient.
      chunk: largest number of positions whose logits exist at once on a device; rounded down to a
        divisor of the device's part of the sequence.
      z_loss: weight of log(Z)^2, which keeps logits from drifting (PaLM, arXiv:2204.02311).

    Returns:
      Objective (cross-entropy plus z-loss), cross-entropy alone, and weight, all summed over
      tokens; only the objective has a gradient. Divide by the weight of the *whole* batch: then
      the mean is also right with gradient accumulation and unequal masks.
    """
    weights_BT = jax.lax.stop_gradient(weights_BT)
    return _cross_entropy(chunk, z_loss, hidden_BTD, head_DV, targets_BT, weights_BT)


def _on_each_device(function: Callable[..., Any], with_gradients: bool) -> Callable[..., Any]:
    """Runs `function(hidden, head, targets, weights)` on the tokens of each device of the mesh.

    XLA's partitioner would gather the matrix and sum its gradient over all devices once per chunk.
    Here both happen once, and the gradient has the sharding of the parameter.

    Args:
      function: returns the three sums; with `with_gradients` also d_hidden_BTD and d_head_DV.
      with_gradients: whether `function` returns the gradients.
    """
    mesh, tokens = jax.sharding.get_abstract_mesh(), activation_spec("batch", "seq")
    axes = tuple(axis for entry in tokens for axis in mesh_axes(entry))
    used = [] if mesh.empty else [axis for axis in axes if mesh.shape[axis] > 1]
    if not used:
        return function  # one device has all tokens
    by_dim = PARAMETERS["lm_head"].placement[0]  # the mesh axes that divide D
    shards = tuple(axis for axis in by_dim if axis in used)
    rest = tuple(axis for axis in used if axis not in shards)

    def local(hidden_BTD: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        sums, *gradients = function(hidden_BTD, *arrays)
        sums_1S = jnp.stack(sums)[None]  # so that one reduction over devices sums all three
        if not with_gradients:
            return (sums_1S,)
        d_hidden_BTD, d_head_DV = gradients
        if shards:
            d_head_DV = jax.lax.psum_scatter(d_head_DV, shards, tiled=True)
        # Nothing needs this sum before the optimiser. Without the barrier a scheduler may delay it
        # until then, which keeps the whole unsummed matrix in memory together with the layers.
        return (sums_1S, *jax.lax.optimization_barrier((d_hidden_BTD, d_head_DV[None])))

    hidden = P(*tokens, None)
    sharded = jax.shard_map(
        local,
        in_specs=(hidden, P(), tokens, tokens),
        out_specs=(P(axes), *((hidden, P(rest, by_dim)) if with_gradients else ())),
        axis_names=set(axes),  # the partitioner still divides the vocabulary
        check_vma=False,
    )

    def summed(*arrays: jax.Array) -> tuple[Any, ...]:
        sums_PS, *gradients = sharded(*arrays)
        if with_gradients:
            gradients[1] = jnp.sum(gradients[1], axis=0)  # over replicas of the matrix
        return (tuple(jnp.sum(sums_PS, axis=0)), *gradients)

    return summed


def n_chunks_of(chunk: int, length: int) -> int:
    """Returns the smallest number of equal chunks of at most `chunk` positions."""
    size = next(size for size in range(min(chunk, length), 0, -1) if length % size == 0)
    return length // size


def to_chunks(x_BT: jax.Array, n_chunks: int) -> jax.Array:
    """Cuts axis T into chunks: maps B T ... to C B T/C ..."""
    shape = (x_BT.shape[0], n_chunks, x_BT.shape[1] // n_chunks, *x_BT.shape[2:])
    return jnp.moveaxis(x_BT.reshape(shape), 1, 0)


def from_chunks(x_CBT: jax.Array) -> jax.Array:
    """Joins chunks again: the inverse of `to_chunks`."""
    x_BCT = jnp.moveaxis(x_CBT, 0, 1)
    return x_BCT.reshape(x_BCT.shape[0], -1, *x_BCT.shape[3:])


def _chunk_loss(
    z_loss: float,
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[Sums, tuple[jax.Array, ...]]:
    logits_BTV = constrain(unembed(hidden_BTD, head_DV), "batch", "seq", "vocab")
    max_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True)
    exp_BTV = jnp.exp(logits_BTV - max_BT1)
    sum_BT1 = jnp.sum(exp_BTV, axis=-1, keepdims=True)
    log_z_BT = (jnp.log(sum_BT1) + max_BT1)[..., 0]
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    entropy = jnp.sum(weights_BT * (log_z_BT - target_BT))
    objective = entropy + z_loss * jnp.sum(weights_BT * jnp.square(log_z_BT))
    return (objective, entropy, jnp.sum(weights_BT)), (exp_BTV, sum_BT1, log_z_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(
    chunk: int,
    z_loss: float,
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> Sums:
    function = functools.partial(_sums, chunk, z_loss)
    return _on_each_device(function, False)(hidden_BTD, head_DV, targets_BT, weights_BT)[0]


def _sums(
    chunk: int, z_loss: float, hidden_BTD: jax.Array, head_DV: jax.Array, *arrays: jax.Array
) -> tuple[Sums]:
    """Computes the sums of objective, cross-entropy and weight over all chunks."""

    def body(total: Sums, chunk: tuple[jax.Array, ...]) -> tuple[Sums, None]:
        hidden, targets, weights = chunk
        sums, _ = _chunk_loss(z_loss, hidden, head_DV, targets, weights)
        return jax.tree.map(jnp.add, total, sums), None

    n_chunks = n_chunks_of(chunk, hidden_BTD.shape[1])
    chunks = tuple(to_chunks(x, n_chunks) for x in (hidden_BTD, *arrays))
    zero = jnp.zeros((), jnp.float32)
    return (jax.lax.scan(body, (zero, zero, zero), chunks)[0],)


def _sums_and_gradients(
    chunk: int, z_loss: float, hidden_BTD: jax.Array, head_DV: jax.Array, *arrays: jax.Array
) -> tuple[Sums, jax.Array, jax.Array]:
    """Computes the three sums and the gradients of the objective; d_head_DV is float32."""

    def body(carry: tuple[Sums, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        total, d_head_DV = carry
        hidden, targets, weights = chunk
        sums, (exp_BTV, sum_BT1, log_z_BT) = _chunk_loss(z_loss, hidden, head_DV, targets, weights)
        # d objective / d logits = w (p - onehot) + w 2 z log(Z) p
        scale_BT = weights * (1 + 2 * z_loss * log_z_BT)
        onehot_BTV = jax.nn.one_hot(targets, head_DV.shape[1], dtype=jnp.float32)
        d_logits_BTV = exp_BTV * (scale_BT[..., None] / sum_BT1) - onehot_BTV * weights[..., None]
        d_logits_BTV = d_logits_BTV.astype(hidden.dtype)
        d_hidden_BTD, d_chunk_DV = unembed_gradients(hidden, head_DV, d_logits_BTV)
        d_head_DV += d_chunk_DV
        return (jax.tree.map(jnp.add, total, sums), d_head_DV), d_hidden_BTD

    n_chunks = n_chunks_of(chunk, hidden_BTD.shape[1])
    chunks = tuple(to_chunks(x, n_chunks) for x in (hidden_BTD, *arrays))
    zero = jnp.zeros((), jnp.float32)
    carry = ((zero, zero, zero), jnp.zeros(head_DV.shape, jnp.float32))
    (sums, d_head_DV), d_hidden_CBTD = jax.lax.scan(body, carry, chunks)
    return sums, from_chunks(d_hidden_CBTD), d_head_DV


def _forward(
    chunk: int, z_loss: float, *arrays: jax.Array
) -> tuple[Sums, tuple[jax.Array, jax.Array]]:
    function = functools.partial(_sums_and_gradients, chunk, z_loss)
    sums, d_hidden_BTD, d_head_DV = _on_each_device(function, True)(*arrays)
    return sums, (d_hidden_BTD, d_head_DV.astype(arrays[1].dtype))


def _backward(
    chunk: int, z_loss: float, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]
) -> tuple[Any, ...]:
    scale = cotangents[0]
    d_hidden_BTD, d_head_DV = (gradient * scale.astype(gradient.dtype) for gradient in saved)
    return d_hidden_BTD, d_head_DV, None, None


_cross_entropy.defvjp(_forward, _backward)
