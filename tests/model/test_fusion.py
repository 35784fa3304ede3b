import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model.fusion import whole_gradient


def test_a_gradient_is_complete_before_it_is_used():
    """A border in the backward pass, and none in the forward pass."""
    x = jnp.arange(6.0)
    plain = jax.grad(lambda x: jnp.sum(jnp.sin(x)))
    bordered = jax.grad(lambda x: jnp.sum(jnp.sin(whole_gradient(x))))
    np.testing.assert_array_equal(plain(x), bordered(x))
    assert "optimization_barrier" not in str(jax.make_jaxpr(whole_gradient)(x))
    assert "optimization_barrier" in str(jax.make_jaxpr(bordered)(x))
