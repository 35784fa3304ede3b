"""NF4 equals goldens from bitsandbytes' CPU wheel, and its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model import nf4
from llama_jax.model.lora import to_float32, to_frozen
from tests.helpers import ROOT

MATRICES = {"wide": (192, 128), "long": (40, 704)}  # (out, in)


def matrix(name):
    """Returns a weight as torch has it, (out, in), with some outliers."""
    rng = np.random.default_rng(len(name))
    weight = rng.standard_normal(MATRICES[name]) * 0.02
    weight[3, 5] = 0.5
    return weight.astype(np.float32)


def by_definition(weight):
    """Computes bitsandbytes' definition in float64: codes, scales and values."""
    flat = weight.astype(np.float64).reshape(-1, 64)
    largest = np.abs(flat).max(axis=1)
    levels = nf4.LEVELS.astype(np.float64)
    codes = np.abs((flat / largest[:, None])[..., None] - levels).argmin(axis=-1)
    offset = largest.mean()
    table = []
    for decade in range(7):
        for part in range(2**decade):
            value = 10.0 ** (decade - 6) * (0.1 + 0.9 * (part + 0.5) / 2**decade)
            table += [value, -value]
    table = np.sort([*table, 0.0, 1.0])
    scales, kept = [], []
    for start in range(0, len(largest), 256):
        group = largest[start : start + 256] - offset
        top = np.abs(group).max()
        found = np.abs(group[:, None] / top - table).argmin(axis=-1)
        scales += found.tolist()
        kept += (table[found] * top + offset).tolist()
    values = levels[codes] * np.array(kept)[:, None]
    return codes.reshape(-1), np.array(scales), values.reshape(weight.shape)


def flat_codes(held, weight):
    """Returns our codes in the order of bitsandbytes, output after output."""
    both = np.stack([held.codes >> 4, held.codes & 15], axis=1)
    return both.reshape(weight.shape[::-1]).T.reshape(-1)


@pytest.mark.parametrize("name", MATRICES)
def test_codes_and_scales_are_those_of_the_definition(name):
    weight = matrix(name)
    held = nf4.quantize(weight.T, 1)
    codes, scales, values = by_definition(weight)
    np.testing.assert_array_equal(flat_codes(held, weight), codes)
    np.testing.assert_array_equal(held.scales.T.reshape(-1), scales)
    got = nf4.dequantize(jax.tree.map(jnp.asarray, held), jnp.float32)
    np.testing.assert_allclose(got, values.T, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", MATRICES)
def test_bits_are_those_of_bitsandbytes(name):
    weight = matrix(name)
    held = nf4.quantize(weight.T, 1)
    with np.load(ROOT / "tests" / "goldens" / f"nf4_{name}.npz") as golden:
        codes = flat_codes(held, weight)
        np.testing.assert_array_equal(codes[::2] << 4 | codes[1::2], golden["codes"])
        np.testing.assert_array_equal(held.scales.T.reshape(-1), golden["scales"])
        np.testing.assert_array_equal(nf4.SCALES, golden["table"])
        np.testing.assert_allclose(held.groups, golden["groups"], rtol=1e-6)
        assert held.offset == pytest.approx(golden["offset"], rel=1e-6)
        got = nf4.dequantize(jax.tree.map(jnp.asarray, held), jnp.float32)
        np.testing.assert_allclose(got, golden["matrix"].T, rtol=0, atol=1e-7)


def test_heads_as_inputs_and_as_outputs_are_one_matrix():
    weight = matrix("wide")
    flat = nf4.quantize(weight.T, 1)
    for shape, path in [((8, 16, 192), "layers/attn/wo"), ((128, 12, 16), "layers/attn/wq")]:
        lora = type("", (), {"base_dtype": "nf4"})
        held = to_frozen(path, weight.T.reshape(shape), lora)
        assert held.codes.reshape(64, 192).tolist() == flat.codes.tolist()
        assert held.groups.tolist() == flat.groups.tolist()
        assert to_float32(held).shape == shape
        assert to_float32(held).reshape(128, 192).tolist() == to_float32(flat).tolist()


def test_abstract_is_what_quantize_gives():
    held = nf4.quantize(np.ones((8, 16, 24), np.float32), 2)
    stack = jax.tree.map(lambda x: jax.typeof(jnp.stack([x, x, x])), held)
    abstract = jax.tree.map(
        lambda x: jax.core.ShapedArray(x.shape, x.dtype), nf4.abstract((8, 16, 24), 2, 3)
    )
    assert jax.tree.map(str, stack) == jax.tree.map(str, abstract)


def test_a_block_of_zeros_stays_zero():
    weight = matrix("wide").T.copy()
    weight[:64] = 0
    values = to_float32(nf4.quantize(weight, 1))
    assert np.isfinite(values).all() and np.abs(values[:64]).max() == 0


def test_bits_per_weight():
    held = nf4.abstract((4096, 32, 128), 1, 1)
    size = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(held))
    assert size * 8 / 4096**2 == pytest.approx(4.127, abs=1e-3)
