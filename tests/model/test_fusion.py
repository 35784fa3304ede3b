import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model.fusion import gradient_barrier


def test_a_gradient_is_complete_before_it_is_used():
    """The backward pass has a barrier, and the forward pass has none."""
    x = jnp.arange(6.0)
    plain = jax.grad(lambda x: jnp.sum(jnp.sin(x)))
    bordered = jax.grad(lambda x: jnp.sum(jnp.sin(gradient_barrier(x))))
    np.testing.assert_array_equal(plain(x), bordered(x))
    assert "optimization_barrier" not in str(jax.make_jaxpr(gradient_barrier)(x))
    assert "optimization_barrier" in str(jax.make_jaxpr(bordered)(x))
