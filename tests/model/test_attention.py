import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import ATTENTION_BACKENDS
from llama_jax.errors import UserError
from llama_jax.model import (
    attention_cudnn,
    attention_splash,
    attention_triton,
    attention_xla,
    context_parallel,
)
from llama_jax.model.attention import BACKENDS, attention
from llama_jax.model.attention_cudnn import is_determinism_requested
from llama_jax.model.attention_scores import Options
from tests.helpers import mesh_of


def inputs(seed, *, batch=2, queries=24, keys=24, n=4, k=2, h=8):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, queries, n, h)).astype(np.float32)
    key = rng.standard_normal((batch, keys, k, h)).astype(np.float32)
    value = rng.standard_normal((batch, keys, k, h)).astype(np.float32)
    return q, key, value


def compiled(function):
    """Returns the function as one newly traced program; op by op, each op would be a program."""
    return jax.jit(lambda *arguments: function(*arguments))


def pretend(monkeypatch, platform):
    """Makes the backends believe that the devices are of another platform."""
    for backend in BACKENDS.values():
        monkeypatch.setattr(backend, "platform", lambda: platform, raising=False)


def segments(seed, batch, length):
    """Returns the ids of documents of random lengths, followed by padding (0)."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((batch, length), np.int32)
    for row in range(batch):
        cuts = np.sort(rng.choice(np.arange(1, length - 2), 3, replace=False))
        ids[row] = 1 + np.searchsorted(cuts, np.arange(length), side="right")
    ids[:, -2:] = 0
    return ids


def reference(q, k, v, mask_BTS):
    """Computes attention in float64, one head after another."""
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
    monkeypatch.setattr(attention_xla, "MAX_BLOCKS", n_blocks)
    monkeypatch.setattr(attention_xla, "MIN_BLOCK", 1)
    q, k, v = inputs(0, k=kv_heads)
    expected = reference(q, k, v, causal(24, 24))
    np.testing.assert_allclose(compiled(attention)(q, k, v), expected, atol=2e-6)


@pytest.mark.parametrize("n_blocks", [1, 4])
def test_segments_do_not_see_each_other(monkeypatch, n_blocks):
    monkeypatch.setattr(attention_xla, "MAX_BLOCKS", n_blocks)
    monkeypatch.setattr(attention_xla, "MIN_BLOCK", 1)
    q, k, v = inputs(1)
    ids = segments(2, 2, 24)
    mask = causal(24, 24) & (ids[:, :, None] == ids[:, None, :])
    out = compiled(lambda q, k, v: attention(q, k, v, segment_ids=(ids, ids)))(q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize("n_blocks", [1, 4, 8])
@pytest.mark.parametrize("window", [1, 3, 5, 6, 23, 100])
def test_a_window_hides_what_is_far_back(monkeypatch, window, n_blocks):
    monkeypatch.setattr(attention_xla, "MAX_BLOCKS", n_blocks)
    monkeypatch.setattr(attention_xla, "MIN_BLOCK", 1)
    q, k, v = inputs(10)
    expected = reference(q, k, v, causal(24, 24, window=window))
    out = compiled(lambda q, k, v: attention(q, k, v, window=window))(q, k, v)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    windowed = compiled(lambda q, k, v: attention(q, k, v, q_offset=5, window=window))
    late = windowed(q[:, :7], k, v)
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
    monkeypatch.setattr(attention_xla, "MAX_BLOCKS", n_blocks)
    monkeypatch.setattr(attention_xla, "MIN_BLOCK", 1)
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

    found = (compiled(jax.grad(loss, (0, 1, 2)))(q, k, v) for loss in (ours, theirs))
    for got, expected in zip(*found, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_bfloat16_keeps_its_dtype_and_softmax_in_float32():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs(7, queries=512, keys=512, batch=1))
    out = compiled(attention)(q, k, v)
    assert out.dtype == jnp.bfloat16
    expected = reference(*(x.astype(jnp.float32) for x in (q, k, v)), causal(512, 512))
    # bfloat16 has 8 bits of precision: a weighted mean is exact to about 2^-8 of the values' size.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.02)


def test_large_scores_do_not_overflow():
    q, k, v = inputs(8)
    out = compiled(attention)(q * 1e3, k * 1e3, v)
    np.testing.assert_allclose(out, reference(q * 1e3, k * 1e3, v, causal(24, 24)), atol=1e-4)


def test_block_counts_divide_the_length():
    for length in (1, 2, 63, 128, 200, 256, 2048, 2050):
        count = attention_xla._n_blocks(length)
        assert length % count == 0
        assert count == 1 or length // count >= attention_xla.MIN_BLOCK
    assert attention_xla._n_blocks(2048) == attention_xla.MAX_BLOCKS


def test_no_square_of_scores_exists():
    q, k, v = inputs(9, batch=1, queries=1024, keys=1024)
    text = str(jax.make_jaxpr(jax.grad(lambda q: attention(q, k, v).sum()))(q))
    assert "128,1024]" in text  # one block of queries against all keys
    assert "1024,1024]" not in text


def test_configs_accept_the_names_of_the_table():
    assert {"auto", *BACKENDS} == set(ATTENTION_BACKENDS)


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="unknown attention backend 'magic'"):
        attention(*inputs(0), backend="magic")


# The other backends, as far as a CPU can test them: Pallas in interpret mode, and the checks before
# a kernel is launched.


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("with_segments", [False, True])
def test_splash_in_interpret_mode(with_segments, window):
    q, k, v = inputs(12, queries=256, keys=256, n=2, k=1, h=16)
    ids = segments(13, 2, 256)
    mask = causal(256, 256, window=window)
    pair = (ids, ids) if with_segments else None
    if with_segments:
        mask = mask & (ids[:, :, None] == ids[:, None, :])
    out = attention_splash.attend(q, k, v, pair, Options(window), interpret=True)
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=1e-5)


def test_gradients_of_splash_in_interpret_mode():
    q, k, v = inputs(14, batch=1, queries=128, keys=128, n=2, k=1, h=16)
    cotangent = np.random.default_rng(6).standard_normal(q.shape).astype(np.float32)

    def loss(function):
        gradients = jax.grad(lambda *x: jnp.vdot(function(*x), cotangent), (0, 1, 2))
        return compiled(gradients)(q, k, v)

    got = loss(lambda q, k, v: attention_splash.attend(q, k, v, None, Options(), interpret=True))
    for ours, expected in zip(got, loss(lambda q, k, v: attention(q, k, v)), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("tile", "backward", "window", "shape"),
    [(128, "split", 0, None), (128, "fused", 100, None), (128, "fused", 0, (1, 1, 2, 1))],
)
def test_tiles_of_splash_change_no_gradient(tile, backward, window, shape):
    q, k, v = inputs(24, batch=1, queries=256, keys=256, n=2, k=1, h=16)
    ids = segments(25, 1, 256)
    cotangent = np.random.default_rng(26).standard_normal(q.shape).astype(np.float32)

    def gradients(function):
        return jax.grad(lambda *x: jnp.vdot(function(*x, (ids, ids)), cotangent), (0, 1, 2))

    def tiled(q, k, v, pair):
        options = Options(window, tile, backward)
        return attention_splash.attend(q, k, v, pair, options, interpret=True)

    with jax.set_mesh(mesh_of(shape)) if shape else contextlib.nullcontext():
        got = jax.jit(gradients(tiled))(q, k, v)
    plain = gradients(lambda q, k, v, pair: attention(q, k, v, segment_ids=pair, window=window))
    for ours, expected in zip(got, compiled(plain)(q, k, v), strict=True):
        np.testing.assert_allclose(ours, expected, atol=5e-5)


@pytest.mark.parametrize(
    ("kind", "keys", "tile", "fused"),
    [
        ("TPU v5", 2048, 512, False),
        ("TPU v5", 4096, 512, False),
        ("TPU v5", 8192, 1024, True),
        ("TPU v6 lite", 8192, 2048, True),
        ("TPU v6 lite", 16384, 2048, True),
        ("TPU v5", 16384, 1024, False),  # d_q once for each of 16 tiles would not fit
        ("TPU v5", 8320, 128, False),
        ("TPU v5", 384, 128, False),
    ],
)
def test_tiles_by_the_length_and_the_chip(monkeypatch, kind, keys, tile, fused):
    monkeypatch.setattr(attention_splash, "device_kind", lambda: kind)
    sizes = attention_splash._tiles(keys, keys, 0, "auto")
    assert {size for name, size in sizes.items() if name.startswith("block")} == {tile}
    assert sizes["use_fused_bwd_kernel"] is fused and ("block_q_dq" in sizes) is not fused
    assert attention_splash._tiles(keys, keys, 128, "split")["block_q"] == 128
    assert not attention_splash._tiles(keys, keys, 0, "split")["use_fused_bwd_kernel"]
    assert attention_splash._tiles(keys, keys, 0, "fused")["use_fused_bwd_kernel"]


@pytest.mark.parametrize("context", [1, 4])
@pytest.mark.parametrize("window", [0, 1, 128, 200])
def test_a_mask_of_tiles_is_the_mask_itself(window, context):
    """Whole tiles have a short cut; every tile equals that of JAX's own masks."""
    shape, masks = (1024, 1024), attention_splash.masks
    ours, theirs = (
        (attention_splash._Window(shape, window), masks.LocalMask(shape, (window - 1, 0), 0))
        if window
        else (attention_splash._Causal(shape), masks.CausalMask(shape))
    )
    order = context_parallel.query_order(1024, context).astype(np.int32)
    ours.q_sequence = theirs.q_sequence = order
    for rows in range(0, 1024, 128):
        for columns in range(0, 1024, 128):
            tile = (slice(rows, rows + 128), slice(columns, columns + 128))
            np.testing.assert_array_equal(ours[tile], theirs[tile])
    # This tile is hidden, which is found without a comparison.
    assert ours[:128, 512:640].strides == (0, 0) or context > 1


@pytest.mark.parametrize("shape", [(1, 2, 1, 2), (2, 1, 2, 2)])
def test_splash_on_a_mesh(shape):
    q, k, v = inputs(15, batch=4, queries=256, keys=256, n=4, k=2, h=16)
    ids = segments(16, 4, 256)

    def run(q, k, v):
        return attention_splash.attend(q, k, v, (ids, ids), Options(), interpret=True)

    with jax.set_mesh(mesh_of(shape)):
        out = jax.jit(run)(q, k, v)
    mask = causal(256, 256) & (ids[:, :, None] == ids[:, None, :])
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("shape", [None, (2, 1, 1, 2)])
@pytest.mark.parametrize("with_segments", [False, True])
def test_triton_in_interpret_mode(with_segments, shape):
    q, k, v = inputs(22, queries=256, keys=256, n=4, k=2, h=16)
    ids = segments(23, 2, 256) if with_segments else None
    mask = causal(256, 256)
    if with_segments:
        mask = mask & (ids[:, :, None] == ids[:, None, :])
    pair = (ids, ids) if with_segments else None

    def run(q, k, v):
        return attention_triton.attend(q, k, v, pair, Options(), interpret=True)

    with jax.set_mesh(mesh_of(shape)) if shape else contextlib.nullcontext():
        out = jax.jit(run)(q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=1e-5)


@pytest.mark.parametrize("with_segments", [False, True])
def test_gradients_of_triton_in_interpret_mode(with_segments):
    q, k, v = inputs(24, batch=1, queries=128, keys=128, n=2, k=1, h=16)
    ids = segments(25, 1, 128) if with_segments else None
    pair = (ids, ids) if with_segments else None
    cotangent = np.random.default_rng(6).standard_normal(q.shape).astype(np.float32)

    def loss(function):
        gradients = jax.grad(lambda *x: jnp.vdot(function(*x), cotangent), (0, 1, 2))
        return compiled(gradients)(q, k, v)

    got = loss(lambda q, k, v: attention_triton.attend(q, k, v, pair, Options(), interpret=True))
    expected = loss(lambda q, k, v: attention(q, k, v, segment_ids=pair))
    for ours, want in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, want, atol=2e-5)


@pytest.mark.parametrize(("backend", "platform"), [("splash", "tpu"), ("triton", "gpu")])
def test_a_backend_gets_what_is_asked_for(monkeypatch, backend, platform):
    arrays = inputs(0, queries=128, keys=128, h=16)
    ids = segments(26, 2, 128)
    asked = {"window": 7 * (backend == "splash"), "tile": 128, "backward": "fused"}
    pretend(monkeypatch, platform)
    monkeypatch.setattr(BACKENDS[backend], "attend", lambda *given: given)
    given = attention(*arrays, segment_ids=(ids, ids), backend=backend, **asked)
    assert all(mine is theirs for mine, theirs in zip(given, arrays, strict=False))
    assert given[3][0] is given[3][1] is ids
    assert given[4] == Options(**asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 5}, "has no sliding window"),
        ({"segment_ids": (np.zeros((2, 128)), np.ones((2, 128)))}, "one array of segment ids"),
    ],
)
def test_masks_that_triton_cannot_honour(monkeypatch, arguments, message):
    pretend(monkeypatch, "gpu")
    with pytest.raises(UserError, match=message):
        attention(*inputs(0, queries=128, keys=128, h=16), **arguments, backend="triton")


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("shape", [(1, 2, 4, 1), (1, 2, 2, 2), (1, 1, 8, 1)])
def test_context_parallel(shape, window):
    q, k, v = inputs(17, batch=4, queries=32, keys=32)
    ids = segments(18, 4, 32)
    cotangent = np.random.default_rng(6).standard_normal(q.shape).astype(np.float32)

    def run(q, k, v):
        return attention(q, k, v, segment_ids=(ids, ids), window=window)

    def both(q, k, v):
        return run(q, k, v), jax.grad(lambda *x: jnp.vdot(run(*x), cotangent), (0, 1, 2))(q, k, v)

    expected, expected_grads = jax.jit(both)(q, k, v)
    with jax.set_mesh(mesh_of(shape)):
        out, grads = jax.jit(both)(q, k, v)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_context_parallel_divides_the_scores():
    q, k, v = inputs(19, batch=2, queries=64, keys=64)
    with jax.set_mesh(mesh_of((1, 1, 8, 1))):
        text = jax.jit(attention).lower(q, k, v).compile().as_text()
    # Chunks of 64 / 16 tokens against each other, and nothing larger.
    assert "f32[2,2,2,4,4]" in text
    assert "f32[2,2,2,8,64]" not in text and "f32[2,2,2,64,64]" not in text


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_devices_exchange_queries_as_the_order_says(size):
    positions = np.arange(32, dtype=np.int32)

    def there_and_back(x):
        moved = context_parallel.to_zigzag(x, 0)
        return moved, context_parallel.from_zigzag(moved, 0)

    spec = jax.P("context")
    with jax.set_mesh(mesh_of((1, 1, size, 1))):
        moved, back = jax.jit(
            jax.shard_map(there_and_back, in_specs=spec, out_specs=(spec, spec), check_vma=False)
        )(positions)
    np.testing.assert_array_equal(moved, context_parallel.query_order(32, size))
    np.testing.assert_array_equal(back, positions)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_every_device_computes_as_much_as_the_others(size):
    def pairs():
        steps = jnp.arange(2 * size + 1)
        pairs = [jnp.stack(context_parallel._pair(step, 2 * size)) for step in steps]
        return jnp.stack(pairs)[None]

    with jax.set_mesh(mesh_of((1, 1, size, 1))):
        found = jax.jit(
            jax.shard_map(pairs, in_specs=(), out_specs=jax.P("context"), check_vma=False)
        )()
    seen = {(int(chunk), int(key)) for device in found for _, key, chunk in device}
    # Each pair of chunks that the causal mask leaves is computed exactly once.
    assert seen == {(q, k) for q in range(2 * size) for k in range(q + 1)}
    assert len(seen) == found.shape[0] * found.shape[1]


@pytest.mark.parametrize(
    ("backend", "platform", "changes", "message"),
    [
        ("splash", "cpu", {}, "the splash kernel runs on TPUs, and this is a cpu; use xla"),
        ("splash", "tpu", {"queries": 100}, "takes multiples of 128 tokens"),
        ("triton", "cpu", {}, "the Triton kernel runs on NVIDIA GPUs, and this is a cpu; use xla"),
        ("triton", "gpu", {}, "takes a head dim of 16 to 128, not 8"),
        ("triton", "gpu", {"queries": 100, "h": 16}, "takes multiples of 128 tokens, not 100"),
        ("cudnn", "tpu", {"queries": 100}, "cuDNN runs on NVIDIA GPUs, and this is a tpu"),
        ("cudnn", "gpu", {}, "takes bfloat16, not float32"),
        ("cudnn", "gpu", {"h": 12, "dtype": "bfloat16"}, "a head dim in multiples of 8 up to 128"),
        ("cudnn", "gpu", {"h": 256, "dtype": "bfloat16"}, "up to 128, not 256"),
    ],
)
def test_what_a_backend_cannot_do_is_an_error(monkeypatch, backend, platform, changes, message):
    pretend(monkeypatch, platform)
    dtype = changes.pop("dtype", "float32")
    changes["keys"] = changes.setdefault("queries", 128)
    q, k, v = (jnp.asarray(x, dtype) for x in inputs(0, **changes))
    with pytest.raises(UserError, match=message):
        attention(q, k, v, backend=backend)
    # `auto` chooses another backend.
    found = jax.eval_shape(lambda q, k, v: attention(q, k, v, backend="auto"), q, k, v)
    assert found.shape == q.shape


@pytest.mark.parametrize("backend", ["auto", "splash"])
def test_a_tile_that_does_not_divide_is_an_error(monkeypatch, backend):
    """`auto` does not choose another backend because of it."""
    pretend(monkeypatch, "tpu")
    message = (
        "model.attention=splash: the 512 tokens of a device are not a multiple of "
        "model.attention_tile=384; use 0"
    )
    with pytest.raises(UserError, match=message):
        attention(*inputs(0, queries=512, keys=512), backend=backend, tile=384)


@pytest.mark.parametrize("backend", ["cudnn", "triton"])
def test_gpu_kernels_do_not_divide_the_sequence(monkeypatch, backend):
    pretend(monkeypatch, "gpu")
    q, k, v = (jnp.asarray(x, "bfloat16") for x in inputs(0, queries=128, keys=128, h=16))
    with (
        jax.set_mesh(mesh_of((1, 1, 2, 1))),
        pytest.raises(UserError, match="does not divide the sequence over mesh.context"),
    ):
        attention(q, k, v, backend=backend)


@pytest.mark.parametrize("name", ["deterministic_ops", "exclude_nondeterministic_ops"])
def test_who_asks_for_the_same_bits(name):
    for value, asked in (
        ("", True),
        ("=true", True),
        ("=1", True),
        ("=false", False),
        (f"=true --xla_gpu_{name}=false", False),  # XLA uses the last one
        ("x", False),
    ):
        flags = f"--xla_dump_to=x --xla_gpu_{name}{value} --xla_y=1"
        assert is_determinism_requested({"XLA_FLAGS": flags}) is asked
    assert not is_determinism_requested({})


def test_cudnn_is_not_taken_where_the_same_bits_are_asked_for(monkeypatch):
    monkeypatch.setattr(attention_cudnn, "is_determinism_requested", lambda: True)
    pretend(monkeypatch, "gpu")
    monkeypatch.setattr(attention_cudnn, "attend", lambda *_: "fast")
    q, k, v = (jnp.asarray(x, "bfloat16") for x in inputs(0, queries=128, keys=128))
    assert attention(q, k, v).shape == q.shape
    with pytest.raises(
        UserError, match="fails with cuDNN attention if XLA_FLAGS request the same bits"
    ):
        attention(q, k, v, backend="cudnn")


@pytest.mark.parametrize(("platform", "chosen"), [("tpu", "splash"), ("gpu", "cudnn")])
def test_auto_takes_the_fast_one(monkeypatch, platform, chosen):
    pretend(monkeypatch, platform)
    monkeypatch.setattr(BACKENDS[chosen], "attend", lambda *_: "fast")
    q, k, v = (jnp.asarray(x, "bfloat16") for x in inputs(0, queries=128, keys=128))
    assert attention(q, k, v) == "fast"


def test_cudnn_gets_segments_and_window(monkeypatch):
    """Checks the arguments of the library call, which runs on its XLA implementation here."""
    call = jax.nn.dot_product_attention
    seen = {}

    def on_xla(*args, implementation, **kwargs):
        seen["implementation"] = implementation
        return call(*args, implementation="xla", **kwargs)

    pretend(monkeypatch, "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    q, k, v = (jnp.asarray(x, "bfloat16") for x in inputs(20))
    ids = segments(21, 2, 24)
    out = attention(q, k, v, segment_ids=(ids, ids), window=5, backend="cudnn")
    mask = causal(24, 24, window=5) & (ids[:, :, None] == ids[:, None, :])
    exact = reference(*(x.astype(jnp.float32) for x in (q, k, v)), mask)
    assert seen == {"implementation": "cudnn"}
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)  # bfloat16
