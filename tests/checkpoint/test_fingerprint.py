import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint.fingerprint import array_fingerprint, changed_arrays, fingerprint
from tests.helpers import TINY, mesh_of, shared_step


def of(array):
    return int(jax.jit(array_fingerprint)(array))


@pytest.fixture(scope="module")
def state():
    """Returns random weights and random moments."""
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        fresh = jax.device_get(shared_step(TINY, mesh).init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(x.dtype) if x.dtype == np.float32 else x,
        fresh,
    )


def test_the_same_on_every_mesh(state):
    prints = []
    for shape in ((1, 1, 1, 1), (8, 1, 1, 1), (2, 2, 1, 2)):
        mesh = mesh_of(shape)
        with jax.set_mesh(mesh):
            shardings = shared_step(TINY, mesh).state_shardings
        prints.append(fingerprint(jax.device_put(state, shardings)))
    assert all(found == prints[0] for found in prints[1:])
    assert {"step", "params/embed", "params/layers/attn/wq"} <= set(prints[0])
    assert len(prints[0]) == len(jax.tree.leaves(state))
    assert len(set(prints[0].values())) > len(prints[0]) / 2
    # Part of a state has the same numbers under the same names.
    assert fingerprint({"params": jax.device_put(state.params)}).items() <= prints[0].items()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "float64"])
def test_every_bit_counts(dtype):
    rng = np.random.default_rng(1)
    with jax.enable_x64(dtype == "float64"):
        array = np.asarray(jnp.asarray(rng.standard_normal((3, 5, 2)) * 100).astype(dtype))
        seen = {of(array)}
        bits = 1 if dtype == "bool" else 8
        for byte in range(array.nbytes):
            for bit in range(bits):
                flipped = array.copy()
                flipped.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
                seen.add(of(flipped))
        assert len(seen) == 1 + array.nbytes * bits


def test_places_count():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    other = array.copy()
    other[0, 1, 2], other[1, 2, 0] = array[1, 2, 0], array[0, 1, 2]
    variants = [array, other, array[::-1], array[:, ::-1], array[:, :, ::-1]]
    variants += [array.reshape(3, 2, 4), array.reshape(24), array.reshape(24, 1)]
    assert len({of(variant) for variant in variants}) == len(variants)


def test_what_float_comparison_misses():
    for left, right in ((0.0, -0.0), (np.float32(1e-42), 0.0)):
        assert of(np.full(3, left, np.float32)) != of(np.full(3, right, np.float32))
    nan = np.full(3, np.nan, np.float32)
    assert of(nan) == of(nan.copy())


def test_arrays_that_changed_places_are_named():
    rng = np.random.default_rng(2)
    a, b = (jnp.asarray(rng.standard_normal((4, 4)), jnp.float32) for _ in range(2))
    saved = fingerprint({"a": a, "b": b, "c": a})
    assert changed_arrays(saved, saved) == []
    assert changed_arrays(saved, fingerprint({"a": b, "b": a, "c": a})) == ["a", "b"]
    assert changed_arrays(saved, fingerprint({"d": a})) == ["d"]
