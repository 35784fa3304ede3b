import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import attention as attention_lib
from llama_jax.attention import attention


def inputs(seed, *, batch=2, queries=24, keys=24, n=4, k=2, h=8):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, queries, n, h)).astype(np.float32)
    key = rng.standard_normal((batch, keys, k, h)).astype(np.float32)
    value = rng.standard_normal((batch, keys, k, h)).astype(np.float32)
    return q, key, value


def segments(seed, batch, length):
    """Documents of random lengths, then padding (0)."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((batch, length), np.int32)
    for row in range(batch):
        cuts = np.sort(rng.choice(np.arange(1, length - 2), 3, replace=False))
        ids[row] = 1 + np.searchsorted(cuts, np.arange(length), side="right")
    ids[:, -2:] = 0
    return ids


def reference(q, k, v, mask_BTS):
    """In float64, one head after another."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    out = np.empty_like(q)
    for head in range(q.shape[2]):
        scores = np.einsum("bth,bsh->bts", q[:, :, head], k[:, :, head // group])
        scores = np.where(mask_BTS, scores / math.sqrt(q.shape[3]), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[:, :, head] = np.einsum("bts,bsh->bth", weights, v[:, :, head // group])
    return out


def causal(queries, keys, offset=0, window=0):
    distance = np.arange(queries)[:, None] + offset - np.arange(keys)[None]
    return ((distance >= 0) & (distance < (window or keys + queries)))[None]


@pytest.mark.parametrize("n_blocks", [1, 2, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_and_grouped(monkeypatch, kv_heads, n_blocks):
    monkeypatch.setattr(attention_lib, "MAX_BLOCKS", n_blocks)
    monkeypatch.setattr(attention_lib, "MIN_BLOCK", 1)
    q, k, v = inputs(0, k=kv_heads)
    expected = reference(q, k, v, causal(24, 24))
    np.testing.assert_allclose(attention(q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize("n_blocks", [1, 4])
def test_segments_do_not_see_each_other(monkeypatch, n_blocks):
    monkeypatch.setattr(attention_lib, "MAX_BLOCKS", n_blocks)
    monkeypatch.setattr(attention_lib, "MIN_BLOCK", 1)
    q, k, v = inputs(1)
    ids = segments(2, 2, 24)
    mask = causal(24, 24) & (ids[:, :, None] == ids[:, None, :])
    out = attention(q, k, v, segment_ids=(ids, ids))
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize("n_blocks", [1, 4, 8])
@pytest.mark.parametrize("window", [1, 3, 5, 6, 23, 100])
def test_a_window_hides_what_is_far_back(monkeypatch, window, n_blocks):
    monkeypatch.setattr(attention_lib, "MAX_BLOCKS", n_blocks)
    monkeypatch.setattr(attention_lib, "MIN_BLOCK", 1)
    q, k, v = inputs(10)
    expected = reference(q, k, v, causal(24, 24, window=window))
    np.testing.assert_allclose(attention(q, k, v, window=window), expected, atol=2e-6)
    late = attention(q[:, :7], k, v, q_offset=5, window=window)
    expected = reference(q[:, :7], k, v, causal(7, 24, 5, window))
    np.testing.assert_allclose(late, expected, atol=2e-6)


def test_a_window_saves_work():
    q, k, v = inputs(11, batch=1, queries=1024, keys=1024)
    text = str(jax.make_jaxpr(lambda q: attention(q, k, v, window=128))(q))
    assert "128,256]" in text and "128,384]" not in text


@pytest.mark.parametrize("offset", [0, 5])
def test_queries_in_the_middle_of_the_keys(offset):
    q, k, v = inputs(3, queries=7)
    expected = reference(q, k, v, causal(7, 24, offset))
    out = jax.jit(lambda offset: attention(q, k, v, q_offset=offset))(offset)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("n_blocks", [1, 4])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("with_segments", [False, True])
def test_gradients_equal_those_of_jax_nn(monkeypatch, with_segments, window, n_blocks):
    monkeypatch.setattr(attention_lib, "MAX_BLOCKS", n_blocks)
    monkeypatch.setattr(attention_lib, "MIN_BLOCK", 1)
    q, k, v = inputs(4)
    ids = segments(5, 2, 24)
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) if with_segments else None
    cotangent = np.random.default_rng(6).standard_normal(q.shape).astype(np.float32)

    def ours(q, k, v):
        pair = (ids, ids) if with_segments else None
        return jnp.vdot(attention(q, k, v, segment_ids=pair, window=window), cotangent)

    def theirs(q, k, v):
        back = (window - 1, 0) if window else None
        out = jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, local_window_size=back
        )
        return jnp.vdot(out, cotangent)

    for got, expected in zip(
        jax.grad(ours, (0, 1, 2))(q, k, v), jax.grad(theirs, (0, 1, 2))(q, k, v), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_bfloat16_keeps_its_dtype_and_softmax_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(7, queries=512, keys=512, batch=1))
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    expected = reference(*(x.astype(jnp.float32) for x in (q, k, v)), causal(512, 512))
    # bfloat16 has 8 bits: a weighted mean is right to about 2^-8 of the values' size.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.02)


def test_large_scores_do_not_overflow():
    q, k, v = inputs(8)
    out = attention(q * 1e3, k * 1e3, v)
    np.testing.assert_allclose(out, reference(q * 1e3, k * 1e3, v, causal(24, 24)), atol=1e-4)


def test_block_counts_divide_the_length():
    for length in (1, 2, 63, 128, 200, 256, 2048, 2050):
        count = attention_lib._n_blocks(length)
        assert length % count == 0
        assert count == 1 or length // count >= attention_lib.MIN_BLOCK
    assert attention_lib._n_blocks(2048) == attention_lib.MAX_BLOCKS


def test_no_square_of_scores_exists():
    q, k, v = inputs(9, batch=1, queries=1024, keys=1024)
    text = str(jax.make_jaxpr(jax.grad(lambda q: attention(q, k, v).sum()))(q))
    assert "128,1024]" in text  # one block of queries against all keys
    assert "1024,1024]" not in text


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="unknown attention backend 'magic'"):
        attention(*inputs(0), backend="magic")
