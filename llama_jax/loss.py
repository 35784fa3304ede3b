"""Next-token cross-entropy that never holds all logits.

At LLaMA's vocabulary of 32,000 the float32 logits of one 2048-token sequence take 262 MB, and their
gradient as much again. So the sequence is cut into chunks, and each chunk's gradient is taken in
the forward pass, while its logits exist: three matrix products per chunk, as in the plain form, and
no recomputation.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.sharding import constrain


def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Weighted sum of -log p(target), in float32.

    Args:
      hidden_BTD: last hidden states.
      head_DV: output matrix; logits are `hidden_BTD @ head_DV`.
      targets_BT: the token that follows each position.
      weights_BT: weight of each position, 0 on padding. It gets no gradient.
      chunk: positions of the sequence whose logits exist at once; rounded down to a divisor of T.
      z_loss: weight of log(Z)^2, which keeps logits from drifting (PaLM, arXiv:2204.02311).

    Returns:
      The objective (cross-entropy plus z-loss) and the cross-entropy alone, both summed over
      tokens; only the first has a gradient. Divide by the sum of the weights of the *whole* batch,
      which makes the mean right under gradient accumulation and unequal masks.
    """
    length = hidden_BTD.shape[1]
    chunk = next(size for size in range(min(chunk, length), 0, -1) if length % size == 0)
    n_chunks = length // chunk
    weights_BT = jax.lax.stop_gradient(weights_BT)
    return _cross_entropy(n_chunks, z_loss, hidden_BTD, head_DV, targets_BT, weights_BT)


def _to_chunks(x_BT: jax.Array, n_chunks: int) -> jax.Array:
    """B T ... -> C B T/C ...; chunk c holds positions c, c + C, ..: a sharded T stays in place."""
    shape = (x_BT.shape[0], x_BT.shape[1] // n_chunks, n_chunks, *x_BT.shape[2:])
    return jnp.moveaxis(x_BT.reshape(shape), 2, 0)


def _from_chunks(x_CBT: jax.Array) -> jax.Array:
    """The inverse of `_to_chunks`."""
    x_BTC = jnp.moveaxis(x_CBT, 0, 2)
    return x_BTC.reshape(x_BTC.shape[0], -1, *x_BTC.shape[3:])


def _chunk_loss(
    z_loss: float,
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
    logits_BTV = constrain(logits_BTV, "batch", "seq", "vocab")
    max_BT1 = jnp.max(logits_BTV, axis=-1, keepdims=True)
    exp_BTV = jnp.exp(logits_BTV - max_BT1)
    sum_BT1 = jnp.sum(exp_BTV, axis=-1, keepdims=True)
    log_z_BT = (jnp.log(sum_BT1) + max_BT1)[..., 0]
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    entropy = jnp.sum(weights_BT * (log_z_BT - target_BT))
    objective = entropy + z_loss * jnp.sum(weights_BT * jnp.square(log_z_BT))
    return objective, entropy, (exp_BTV, sum_BT1, log_z_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(
    n_chunks: int,
    z_loss: float,
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    def body(total: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[Any, None]:
        hidden, targets, weights = chunk
        objective, entropy, _ = _chunk_loss(z_loss, hidden, head_DV, targets, weights)
        return (total[0] + objective, total[1] + entropy), None

    chunks = tuple(_to_chunks(x, n_chunks) for x in (hidden_BTD, targets_BT, weights_BT))
    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero), chunks)[0]


def _forward(
    n_chunks: int,
    z_loss: float,
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    def body(carry: tuple[jax.Array, ...], chunk: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        objective, entropy, d_head_DV = carry
        hidden, targets, weights = chunk
        add_objective, add_entropy, (exp_BTV, sum_BT1, log_z_BT) = _chunk_loss(
            z_loss, hidden, head_DV, targets, weights
        )
        # d objective / d logits = w (p - onehot) + w 2 z log(Z) p
        scale_BT = weights * (1 + 2 * z_loss * log_z_BT)
        onehot_BTV = jax.nn.one_hot(targets, head_DV.shape[1], dtype=jnp.float32)
        d_logits_BTV = exp_BTV * (scale_BT[..., None] / sum_BT1) - onehot_BTV * weights[..., None]
        d_logits_BTV = d_logits_BTV.astype(hidden.dtype)
        d_hidden_BTD = jnp.einsum("BTV,DV->BTD", d_logits_BTV, head_DV)
        d_head_DV += jnp.einsum(
            "BTD,BTV->DV", hidden, d_logits_BTV, preferred_element_type=jnp.float32
        )
        return (objective + add_objective, entropy + add_entropy, d_head_DV), d_hidden_BTD

    chunks = tuple(_to_chunks(x, n_chunks) for x in (hidden_BTD, targets_BT, weights_BT))
    zero = jnp.zeros((), jnp.float32)
    carry = (zero, zero, jnp.zeros(head_DV.shape, jnp.float32))
    (objective, entropy, d_head_DV), d_hidden_CBTD = jax.lax.scan(body, carry, chunks)
    return (objective, entropy), (_from_chunks(d_hidden_CBTD), d_head_DV.astype(head_DV.dtype))


def _backward(
    n_chunks: int, z_loss: float, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]
) -> tuple[Any, ...]:
    d_hidden_BTD, d_head_DV = saved
    scale = cotangents[0]
    return (
        d_hidden_BTD * scale.astype(d_hidden_BTD.dtype),
        (d_head_DV * scale.astype(d_head_DV.dtype)),
        None,
        None,
    )


_cross_entropy.defvjp(_forward, _backward)
