"""Products with the output head; no other file multiplies activations and weights."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax.model.linear import unembed, unembed_gradients

PACKAGE = pathlib.Path(llama_jax.__file__).parent
# Attention scores and RoPE multiply only activations; merging an adapter multiplies only weights.
OTHERS = {"attention_scores", "attention_xla", "context_parallel", "rope", "lora"}
PRODUCTS = ("einsum", "dot", "matmul", "dot_general")


def arrays(dtype):
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 8), (8, 12), (2, 5, 12))
    return (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_head_by_hand(dtype):
    """Logits of a sequence and of one token, and both gradients, the head's in float32."""
    hidden, head, d_logits = arrays(dtype)
    whole, last = jax.jit(lambda x, w: (unembed(x, w), unembed(x[:, -1], w)))(hidden, head)
    assert whole.dtype == last.dtype == jnp.float32
    exact = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    np.testing.assert_allclose(whole, exact, atol=1e-5)
    np.testing.assert_allclose(last, exact[:, -1], atol=1e-5)
    d_hidden, d_head = jax.jit(unembed_gradients)(hidden, head, d_logits)
    assert (d_hidden.dtype, d_head.dtype) == (hidden.dtype, jnp.float32)
    x, w, d = (np.asarray(array, np.float64) for array in (hidden, head, d_logits))
    np.testing.assert_allclose(
        np.asarray(d_hidden, np.float64), d @ w.T, atol=1e-5 if dtype == "float32" else 0.1
    )
    np.testing.assert_allclose(d_head, np.einsum("btd,btv->dv", x, d), atol=1e-5)


def test_products_with_weights_are_in_one_file():
    """To change the precision of products, one changes one file."""
    making = {
        file.stem
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.Attribute) and node.attr in PRODUCTS)
        or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult))
    }
    assert making - OTHERS == {"linear"}
