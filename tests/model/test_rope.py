"""RoPE that is stretched to long contexts; `test_transfer_parity` compares it with transformers."""

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint import saved_step
from llama_jax.errors import UserError
from llama_jax.inference import decode
from llama_jax.inference.logprobs import Scorer, Span
from llama_jax.interchange import model_card
from llama_jax.model.llama import forward, logits
from llama_jax.model.rope import apply_rope, document_lengths, rope_frequencies, rope_tables
from tests.helpers import TINY, mesh_of, random_params, replace

WIDE = replace(TINY, model__explicit_head_dim=64).model
ORIGINAL = 24
DYNAMIC = replace(
    TINY,
    model__n_kv_heads=2,
    model__rope_scaling="dynamic",
    model__rope_scaling_factor=4.0,
    model__rope_original_context=ORIGINAL,
).model
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 60), dtype=np.int32)


def plain(pair, theta=1e4, head_dim=64):
    return theta ** (-2 * pair / head_dim)


def test_linear_by_hand():
    config = dataclasses.replace(WIDE, rope_scaling="linear", rope_scaling_factor=4.0)
    expected = [plain(pair) / 4 for pair in range(32)]
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)


@pytest.mark.parametrize(("length", "growth"), [(10, 1), (100, 1), (101, 1.04), (400, 13.0)])
def test_dynamic_by_hand(length, growth):
    """Theta grows as 4 L / 100 - 3 to the power of 64 / 62."""
    config = dataclasses.replace(
        WIDE, rope_scaling="dynamic", rope_scaling_factor=4.0, rope_original_context=100
    )
    expected = [plain(pair, 1e4 * growth ** (64 / 62)) for pair in range(32)]
    np.testing.assert_allclose(rope_frequencies(config, jnp.int32(length)), expected, rtol=2e-6)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_by_hand(truncate):
    """YaRN's equations 20 to 23 for 4096 tokens stretched by 16, one pair after the other."""
    config = dataclasses.replace(
        WIDE,
        rope_scaling="yarn",
        rope_scaling_factor=16.0,
        rope_original_context=4096,
        rope_truncate=truncate,
    )
    # The pair whose wavelength 2 pi 10000^(2 i / 64) is 4096 / 32, and the pair where it is 4096.
    low = 32 * math.log(4096 / 32 / (2 * math.pi)) / math.log(1e4)
    high = 32 * math.log(4096 / (2 * math.pi)) / math.log(1e4)
    assert (round(low, 2), round(high, 2)) == (10.47, 22.51)
    if truncate:
        low, high = 10, 23
    expected = []
    for pair in range(32):
        stretched = min(max((pair - low) / (high - low), 0), 1)
        expected.append(plain(pair) * (stretched / 16 + 1 - stretched))
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)
    # Equation 22: cos and sin are scaled to sharpen attention.
    cos, sin = rope_tables(jnp.arange(50)[None], config)
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * math.log(16) + 1, rtol=1e-6)
    given = dataclasses.replace(config, rope_attention_factor=0.75)
    np.testing.assert_allclose(np.hypot(*rope_tables(jnp.arange(5)[None], given)), 0.75, rtol=1e-6)


def test_lengths_of_documents():
    positions = [[0, 1, 2, 0, 0, 1], [0, 0, 0, 1, 2, 3], [4, 5, 6, 7, 0, 1]]
    expected = [[3, 3, 3, 1, 2, 2], [1, 1, 4, 4, 4, 4], [8, 8, 8, 8, 2, 2]]
    np.testing.assert_array_equal(document_lengths(jnp.array(positions)), expected)


def hidden(tokens, **arguments):
    compute = jax.jit(lambda params, **given: forward(DYNAMIC, params, tokens, **given)[0])
    return np.asarray(compute(random_params(DYNAMIC), **arguments))


def test_dynamic_goes_by_the_length_of_each_document():
    """Packed documents give the results of each alone, also on a mesh that divides the sequence."""
    lengths = (44, 16)
    positions = np.concatenate([np.arange(length) for length in lengths])[None].repeat(2, 0)
    segments = np.repeat([1, 2], lengths)[None].repeat(2, 0).astype(np.int32)
    with jax.set_mesh(mesh_of((1, 2, 2, 2))):
        packed = hidden(TOKENS, positions_BT=positions.astype(np.int32), segment_ids_BT=segments)
    np.testing.assert_allclose(packed[:, :44], hidden(TOKENS[:, :44]), atol=2e-5)
    np.testing.assert_allclose(packed[:, 44:], hidden(TOKENS[:, 44:]), atol=2e-5)
    # The first tokens of a longer sequence are computed with another theta.
    assert np.abs(hidden(TOKENS)[:, :44] - packed[:, :44]).max() > 1e-3


def test_scores_do_not_depend_on_the_padding():
    config, params = DYNAMIC, random_params(DYNAMIC)
    spans = [Span(TOKENS[0, :41].tolist(), 10), Span(TOKENS[1, :30].tolist(), 5)]
    scores = Scorer(config, params, context=64, batch_size=2)(spans)
    for span, score in zip(spans, scores, strict=True):
        tokens = np.array(span.tokens)
        exact = jax.nn.log_softmax(logits(config, params, tokens[None, :-1])[0], axis=-1)
        expected = np.take_along_axis(np.asarray(exact), tokens[1:, None], 1)[-span.scored :, 0]
        np.testing.assert_allclose(score.logprobs, expected, atol=2e-5)


def test_a_prompt_in_pieces_is_one_prompt(monkeypatch):
    """Beyond the original context, all pieces of a prompt have the theta of the whole prompt."""
    params, lengths = random_params(DYNAMIC), [41, 30]
    monkeypatch.setattr(decode, "PREFILL", 16)
    padded = np.zeros((2, 64), np.int32)
    for row, length in enumerate(lengths):
        padded[row, 64 - length :] = TOKENS[row, :length]
    state = decode._prefill(DYNAMIC, 64, params, padded, np.array(lengths))
    for row, length in enumerate(lengths):
        expected = logits(DYNAMIC, params, TOKENS[row : row + 1, :length])[0, -1]
        np.testing.assert_allclose(state.logits_BV[row], expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_the_card_tells_the_kind(tmp_path, kind):
    config = replace(TINY, model__rope_scaling=kind, model__rope_scaling_factor=4.0)
    text = model_card.render(saved_step.StepMeta(config, 0, "", b""), epath.Path(tmp_path))
    assert f"| RoPE scaling | 4 ({kind}) |" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "ntk"}, "model.rope_scaling must be one of llama3, .* yarn, got 'ntk'"),
        (
            {"rope_scaling": "linear", "rope_scaling_factor": 0.5},
            "factor must be at least 1, got 0.5",
        ),
        ({"rope_scaling_factor": 1e30}, r"factor=1e\+30 stretches .* beyond 2\*\*31 tokens"),
        ({"rope_beta_fast": 1.0}, "rope_beta_slow must be positive and less than rope_beta_fast"),
        ({"rope_attention_factor": -1.0}, "rope_attention_factor must be 0 or more"),
        ({"rope_scaling": "yarn", "rope_theta": 1.0}, "rope_theta must be greater than 1 for yarn"),
        ({"rope_scaling": "dynamic", "explicit_head_dim": 2}, "a head size of more than 2"),
    ],
)
def test_a_config_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY.model, **changes)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0), ("float32", 1e-6)])
def test_a_tpu_rotates_by_a_product_and_gets_the_same(monkeypatch, dtype, tolerance):
    """The gradients are the same, too; in bfloat16, in which TPUs train, to the bit."""
    rng = np.random.default_rng(3)
    x, cotangent = (jnp.asarray(rng.standard_normal((2, 20, 3, 64)), dtype) for _ in range(2))
    positions = jnp.asarray(rng.integers(0, 5000, (2, 20)))
    tables = rope_tables(positions, WIDE)

    def rotated():
        out, back = jax.vjp(lambda x: apply_rope(x, *tables), x)
        return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), (out, *back(cotangent)))

    here = rotated()
    monkeypatch.setattr(sys.modules[apply_rope.__module__], "platform", lambda: "tpu")
    assert "dot_general" in str(jax.make_jaxpr(lambda x: apply_rope(x, *tables))(x))
    for ours, expected in zip(rotated(), here, strict=True):
        np.testing.assert_allclose(ours, expected, atol=tolerance, rtol=0)
