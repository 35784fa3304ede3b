import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.model.loss import cross_entropy

B, T, D, V = 3, 12, 8, 50


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((B, T, D)).astype(np.float32)
    head = rng.standard_normal((D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T), dtype=np.int32)
    weights = (rng.random((B, T)) > 0.3).astype(np.float32) * rng.random((B, T), np.float32)
    return hidden, head, targets, weights


def reference(hidden, head, targets, weights, z_loss):
    """Computes the objective, the entropy and the sum of weights in float64."""
    logits = hidden.astype(np.float64) @ head.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    entropy = (weights * (log_z - np.take_along_axis(logits, targets[..., None], -1)[..., 0])).sum()
    return entropy + z_loss * (weights * log_z**2).sum(), entropy, weights.sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 12, 100])
def test_value_in_float64(chunk, z_loss):
    values = inputs()
    got = cross_entropy(*values, chunk=chunk, z_loss=z_loss)
    np.testing.assert_allclose(got, reference(*values, z_loss), rtol=2e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk", [3, 12])
def test_value_and_gradient_equal_those_of_optax(chunk, z_loss):
    hidden, head, targets, weights = inputs(1)

    def ours(hidden, head):
        return cross_entropy(hidden, head, targets, weights, chunk=chunk, z_loss=z_loss)[0] * 0.37

    def theirs(hidden, head):
        logits = hidden @ head
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        log_z = jax.scipy.special.logsumexp(logits, axis=-1)
        return (weights * (entropy + z_loss * log_z**2)).sum() * 0.37

    value, grads = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
    expected_value, expected = jax.jit(jax.value_and_grad(theirs, (0, 1)))(hidden, head)
    np.testing.assert_allclose(value, expected_value, rtol=2e-6)
    np.testing.assert_allclose(grads[0], expected[0], atol=2e-6)
    np.testing.assert_allclose(grads[1], expected[1], atol=5e-6)


def test_masked_positions_count_nothing():
    hidden, head, targets, weights = inputs(2)
    wild = np.where(weights[..., None] == 0, 1e3, hidden).astype(np.float32)

    def total(hidden):
        return cross_entropy(hidden, head, targets, weights, chunk=4)[0]

    assert total(wild) == total(hidden)
    assert not np.asarray(jax.grad(total)(wild))[weights == 0].any()


def test_huge_logits_stay_finite():
    hidden, head, targets, weights = inputs(3)
    got = cross_entropy(hidden * 1e4, head, targets, weights, chunk=4)
    np.testing.assert_allclose(got, reference(hidden * 1e4, head, targets, weights, 0), rtol=1e-5)


def test_only_a_chunk_of_the_logits_ever_exists():
    hidden, head, targets, weights = inputs()

    def compiled(chunk):
        def loss(hidden, head):
            return cross_entropy(hidden, head, targets, weights, chunk=chunk)[0]

        return jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head).compile().as_text()

    def largest(text):
        """Returns the size of the largest array with a dimension of size V, except the head."""
        import math
        import re

        shapes = re.findall(r"f32\[([\d,]+)\]", text)
        dims = [tuple(map(int, shape.split(","))) for shape in shapes]
        return max(math.prod(d) for d in dims if V in d and d != (D, V) and d != (V, D))

    assert largest(compiled(T)) == B * T * V
    assert largest(compiled(3)) == B * 3 * V


def test_bfloat16_hidden_states_give_a_float32_loss():
    hidden, head, targets, weights = inputs(4)
    half = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    objective, entropy, weight = cross_entropy(*half, targets, weights, chunk=4)
    assert objective.dtype == entropy.dtype == weight.dtype == jnp.float32
    exact = reference(*(np.asarray(x, np.float32) for x in half), targets, weights, 0)
    # The inputs are the same bfloat16 numbers, so only float32 rounding is left.
    np.testing.assert_allclose(objective, exact[0], rtol=1e-5)
    grads = jax.grad(lambda h, w: cross_entropy(h, w, targets, weights, chunk=4)[0], (0, 1))(*half)
    assert grads[0].dtype == grads[1].dtype == jnp.bfloat16
