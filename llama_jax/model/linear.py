"""All products of activations and weights, and the gate of SwiGLU.

A weight is trained, frozen, or frozen with an adapter. The output head has its own functions.

Einsum letters are those of llama.py; r is the rank of an adapter.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llama_jax.config import LoraConfig
from llama_jax.model.nf4 import NF4, dequantize
from llama_jax.parallel.sharding import constrain


def weight(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    dtype: Any,
) -> Any:
    """Returns a parameter of a module in the compute dtype, or unchanged if it is in NF4.

    Args:
      module: the module, which declares the parameter by this call.
      name: name of the parameter in the module.
      init: makes the initial values.
      shape: shape of the parameter.
      dtype: compute dtype.
    """
    held: Any = module.get_variable("params", name)
    if isinstance(held, NF4):
        return held
    return module.param(name, init, shape).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Computes `einsum(equation, x, w)`, with a weight gradient that is faster on CPUs.

    The gradient of the weight is written as the product of x and d_out. In JAX's own order,
    XLA:CPU first transposes d_out, which is the larger of the two in an MLP.

    Args:
      equation: the einsum equation.
      x: activations.
      w: the weight.
    """
    return jnp.einsum(equation, x, w)


def _project_forward(
    equation: str, x: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.einsum(equation, x, w), (x, w)


def _project_backward(
    equation: str, saved: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    operands, out_axes = equation.split("->")
    x_axes, w_axes = operands.split(",")
    d_x = jnp.einsum(f"{out_axes},{w_axes}->{x_axes}", d_out, w)
    return d_x, jnp.einsum(f"{x_axes},{out_axes}->{w_axes}", x, d_out)


project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project_frozen(equation: str, x: jax.Array, w: Any) -> jax.Array:
    """Computes `einsum(equation, x, w)` with a weight that gets no gradient.

    The backward pass keeps the weight in its stored form, and does not keep x. So a matrix in NF4
    exists in the dtype of x only during one product, for every value of `model.remat`.

    Args:
      equation: the einsum equation.
      x: activations.
      w: the weight, an array or `NF4`.
    """
    return jnp.einsum(equation, x, _as_array(w, x.dtype))


def _as_array(w: Any, dtype: Any) -> jax.Array:
    return dequantize(w, dtype) if isinstance(w, NF4) else w


def _frozen_forward(equation: str, x: jax.Array, w: Any) -> tuple[jax.Array, Any]:
    return project_frozen(equation, x, w), w


def _frozen_backward(equation: str, w: Any, d_out: jax.Array) -> tuple[jax.Array, None]:
    operands, out_axes = equation.split("->")
    x_axes, w_axes = operands.split(",")
    d_x = jnp.einsum(f"{out_axes},{w_axes}->{x_axes}", d_out, _as_array(w, d_out.dtype))
    return d_x, None


project_frozen.defvjp(_frozen_forward, _frozen_backward)


def unembed(hidden: jax.Array, head_DV: jax.Array) -> jax.Array:
    """Computes logits in float32: B T V from hidden states B T D, or B V from B D."""
    tokens = "BT"[: hidden.ndim - 1]
    equation = f"{tokens}D,DV->{tokens}V"
    return jnp.einsum(equation, hidden, head_DV, preferred_element_type=jnp.float32)


def unembed_gradients(
    hidden_BTD: jax.Array, head_DV: jax.Array, d_logits_BTV: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradients of both operands of `unembed`; the loss calls it once per chunk.

    Args:
      hidden_BTD: hidden states.
      head_DV: output matrix.
      d_logits_BTV: gradient of the logits, in the dtype of `hidden_BTD`.

    Returns:
      d_hidden_BTD in that dtype, and d_head_DV in float32, because the chunks are summed.
    """
    d_hidden_BTD = jnp.einsum("BTV,DV->BTD", d_logits_BTV, head_DV)
    d_head_DV = jnp.einsum(
        "BTD,BTV->DV", hidden_BTD, d_logits_BTV, preferred_element_type=jnp.float32
    )
    return d_hidden_BTD, d_head_DV


@jax.custom_vjp
def gated_silu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Computes silu(gate) * up, the elementwise part of SwiGLU.

    The backward pass keeps only the two inputs.
    """
    return jax.nn.silu(gate) * up


def _gated_silu_forward(
    gate: jax.Array, up: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Without the barrier XLA may fuse silu(gate) * up into the product that reads it, which then
    # computes it once per tile.
    return jax.lax.optimization_barrier(gated_silu(gate, up)), (gate, up)


def _gated_silu_backward(
    saved: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    # With the barrier, d_gate and d_up are not computed inside the product that makes d_out, and
    # so they can reuse the buffers of gate and up.
    d_out = jax.lax.optimization_barrier(d_out)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_gate = d_out * up * (sigmoid + silu * (1 - sigmoid))
    # Without the barrier XLA:CPU recomputes the exponentials inside the transposed copies that the
    # weight gradients read; that takes longer than the matrix products themselves.
    return jax.lax.optimization_barrier((d_gate, d_out * silu))


gated_silu.defvjp(_gated_silu_forward, _gated_silu_backward)


def adapter_equations(equation: str) -> tuple[str, str]:
    """Derives the equations of x A and (x A) B from the equation of x W.

    For example, `BTD,DNH->BTNH` gives `BTD,Dr->BTr` and `BTr,rNH->BTNH`.
    """
    operands, out_axes = equation.split("->")
    x_axes, w_axes = operands.split(",")
    inputs = "".join(axis for axis in w_axes if axis in x_axes)
    outputs = "".join(axis for axis in w_axes if axis not in x_axes)
    middle = "".join(axis for axis in x_axes if axis not in inputs) + "r"
    return f"{x_axes},{inputs}r->{middle}", f"{middle},r{outputs}->{out_axes}"


def project_named(
    module: nn.Module, lora: LoraConfig | None, name: str, equation: str, x: jax.Array, w: Any
) -> jax.Array:
    """Computes the product with a weight of a module; adds the product with its adapter, if any.

    The adapter adds scale (dropout(x) A) B (LoRA, arXiv:2106.09685). As in PEFT, each adapter has
    its own dropout mask.

    Args:
      module: the module that has the weight and the adapter.
      lora: the adapters; with them, the weight is frozen. None: the weight is trained.
      name: name of the weight in the module.
      equation: the einsum equation of x and w.
      x: activations.
      w: the weight, see `weight`.
    """
    if lora is None:
        return project(equation, x, w)
    out = project_frozen(equation, x, w)
    if not module.has_variable("adapters", name):
        return out
    adapter: Any = module.get_variable("adapters", name)
    if lora.dropout and module.has_rng("dropout"):
        keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - lora.dropout, x.shape)
        x = jnp.where(keep, x / (1 - lora.dropout), jnp.zeros_like(x))
    into, out_of = adapter_equations(equation)
    middle_BTr = constrain(project(into, x, adapter["a"].astype(x.dtype)), "batch", "seq", None)
    return out + lora.scale * project(out_of, middle_BTr, adapter["b"].astype(x.dtype))
