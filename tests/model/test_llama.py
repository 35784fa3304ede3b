import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import REMAT_NAMES
from llama_jax.model.cost import parameter_count
from llama_jax.model.llama import forward, init_cache, init_params, logits, rms_norm
from llama_jax.model.rope import apply_rope, rope_frequencies, rope_tables
from tests.helpers import TINY, mesh_of, meshes, random_batch, random_params, replace, shared_step

CONFIG = replace(TINY, model__n_kv_heads=2).model
TOKENS = np.random.default_rng(0).integers(0, 64, (3, 16), dtype=np.int32)


@functools.cache
def initial(config):
    return jax.jit(lambda key: init_params(config, key))(jax.random.key(0))


def test_parameter_tree():
    params = initial(CONFIG)
    shapes = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    assert shapes == {
        "embed": (64, 32),
        "layers/attn_norm": (2, 32),
        "layers/attn/wq": (2, 32, 4, 8),
        "layers/attn/wk": (2, 32, 2, 8),
        "layers/attn/wv": (2, 32, 2, 8),
        "layers/attn/wo": (2, 4, 8, 32),
        "layers/mlp_norm": (2, 32),
        "layers/mlp/w1": (2, 32, 48),
        "layers/mlp/w3": (2, 32, 48),
        "layers/mlp/w2": (2, 48, 32),
        "final_norm": (32,),
        "lm_head": (32, 64),
    }
    assert type(params) is dict
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_initial_weights_have_their_size():
    config = replace(TINY, model__dim=128, model__ffn_dim=256, model__vocab_size=512).model
    params = initial(config)
    assert float(params["embed"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(params["layers"]["mlp"]["w1"].std()) == pytest.approx(0.02, rel=0.05)
    # Two layers: 1 / sqrt(2 * 2).
    assert float(params["layers"]["mlp"]["w2"].std()) == pytest.approx(0.01, rel=0.05)
    assert float(params["layers"]["attn"]["wo"].std()) == pytest.approx(0.01, rel=0.05)
    # A normal distribution has mean 0, 68.3% within one standard deviation and 95.4% within two.
    scaled = np.abs(params["embed"]) / 0.02
    assert abs(float(params["embed"].mean())) < 0.02 * 0.02
    assert float((scaled < 1).mean()) == pytest.approx(0.683, abs=0.01)
    assert float((scaled < 2).mean()) == pytest.approx(0.954, abs=0.01)
    first, second = params["layers"]["attn"]["wq"]
    assert not np.array_equal(first, second)


@functools.cache
def initial_on(shape):
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        return jax.device_get(shared_step(TINY, mesh).init(jax.random.key(3)))


@pytest.mark.parametrize("shape", meshes((2, 2, 1, 2), (1, 2, 2, 2)))
def test_initial_weights_are_the_same_bits_on_every_mesh(shape):
    whole, spread = initial_on((1, 1, 1, 1)), initial_on(shape)
    jax.tree.map(np.testing.assert_array_equal, whole, spread)


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_initial_weights_need_no_kernel(backend):
    config = replace(TINY, model__attention=backend).model
    params = initial(config)
    expected = initial(TINY.model)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_rms_norm_in_float64():
    x = np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)
    scale = np.linspace(0.5, 2, 8, dtype=np.float32)
    exact = x.astype(np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(rms_norm(x, scale, 1e-3), exact, rtol=1e-6)


def test_rms_norm_of_bfloat16_is_done_in_float32():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((64, 128)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    got = rms_norm(x, jnp.ones(128), 1e-6)
    assert got.dtype == jnp.bfloat16
    # It is rounded once, at the end; with bfloat16 throughout, half of the numbers would differ.
    assert (got == jnp.asarray(exact, jnp.bfloat16)).mean() > 0.99


def test_rope_depends_on_the_distance_alone():
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 1, 1, 1, 8)).astype(np.float32)

    def score(query_position, key_position):
        positions = np.array([[query_position], [key_position]])
        cos, sin = rope_tables(jnp.asarray(positions), CONFIG)
        return float((apply_rope(q, cos[:1], sin[:1]) * apply_rope(k, cos[1:], sin[1:])).sum())

    assert score(5, 2) == pytest.approx(score(1005, 1002), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2


def test_the_future_is_not_seen():
    params = random_params(CONFIG)
    before = logits(CONFIG, params, TOKENS)
    changed = TOKENS.copy()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    after = logits(CONFIG, params, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert np.abs(before[:, 9:] - after[:, 9:]).max(axis=(0, 2)).min() > 1e-3


def test_packed_documents_equal_documents_alone():
    params = random_params(CONFIG)
    first, second = TOKENS[:1, :6], TOKENS[1:2, :10]
    packed = np.concatenate([first, second], axis=1)
    positions = {"positions_BT": np.array([[*range(6), *range(10)]])}
    segments = {"segment_ids_BT": np.array([[1] * 6 + [2] * 10])}
    run = jax.jit(lambda params: forward(CONFIG, params, packed, **positions, **segments))
    hidden, head, _ = run(params)
    out = np.asarray(hidden) @ np.asarray(head)
    np.testing.assert_allclose(out[:, :6], logits(CONFIG, params, first), atol=2e-5)
    np.testing.assert_allclose(out[:, 6:], logits(CONFIG, params, second), atol=2e-5)


def test_the_cache_changes_nothing():
    params = random_params(CONFIG)
    cache = init_cache(CONFIG, 3, 20)
    step = jax.jit(
        lambda tokens, cache: forward(
            CONFIG, params, tokens, segment_ids_BT=jnp.ones_like(tokens), cache=cache
        )
    )
    parts = []
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 16)):
        hidden, head, cache = step(TOKENS[:, start:stop], cache)
        parts.append(hidden @ head)
    assert int(cache.index) == 16
    np.testing.assert_allclose(
        np.concatenate(parts, axis=1), logits(CONFIG, params, TOKENS), atol=2e-5
    )


def test_tied_embeddings_are_the_transposed_table():
    tied = replace(TINY, model__tied_embeddings=True).model
    params = random_params(tied)
    untied = {**params, "lm_head": params["embed"].T}
    np.testing.assert_array_equal(logits(tied, params, TOKENS), logits(TINY.model, untied, TOKENS))


def test_bfloat16_is_near_float32():
    half = replace(TINY, model__compute_dtype="bfloat16").model
    params = initial(TINY.model)
    hidden, head, _ = jax.jit(lambda p: forward(half, p, TOKENS))(params)
    assert hidden.dtype == head.dtype == jnp.bfloat16
    exact, exact_head, _ = jax.jit(lambda p: forward(TINY.model, p, TOKENS))(params)
    assert exact.dtype == exact_head.dtype == jnp.float32
    # Hidden states are about 1 after the norm, bfloat16 has 8 bits of precision, and the errors of
    # layers add up.
    np.testing.assert_allclose(hidden.astype(jnp.float32), exact, atol=0.05)


POLICIES = (
    *("full", "dots", "offload:block_in", "save:q;offload:mlp_up"),
    *(f"save:{name}" for name in REMAT_NAMES),
)


def loss_of(config, params, batch):
    from llama_jax.train.step import _loss_sums

    return _loss_sums(params, batch, config)[0]


@functools.cache
def loss_and_gradient(policy):
    config, batch = replace(TINY, model__remat=policy), random_batch(TINY, 0)
    loss = jax.jit(jax.value_and_grad(lambda p: loss_of(config, p, batch)))
    return loss(random_params(TINY.model))


@pytest.mark.parametrize("policy", POLICIES)
def test_remat_changes_memory_and_nothing_else(policy):
    value, grads = loss_and_gradient(policy)
    expected_value, expected = loss_and_gradient("none")
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, atol=2e-6 * scale)


def residual_elements(config, batch, params):
    """Returns the number of elements that the forward pass keeps for the backward pass."""
    pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: loss_of(config, p, batch), p)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(pullback))


def test_each_named_tensor_is_kept_when_asked_for():
    batch = random_batch(TINY, 0)
    params = random_params(TINY.model)
    sizes = {
        policy: residual_elements(replace(TINY, model__remat=policy), batch, params)
        for policy in ("none", *POLICIES)
    }
    tokens, layers = TINY.train.tokens_per_step, TINY.model.n_layers
    for name in REMAT_NAMES:
        width = 48 if name in ("mlp_gate", "mlp_up") else 32
        extra = sizes[f"save:{name}"] - sizes["full"]
        # attn_context comes with one more number per head, its log-sum-exp
        expected = width + (4 if name == "attn_context" else 0)
        if name == "block_in":  # "full" keeps it too, because everything is recomputed from it
            expected = 0
        assert extra == layers * tokens * expected, name
    assert sizes["full"] < sizes["dots"] < sizes["none"]
    assert sizes["save:q;offload:mlp_up"] == sizes["full"] + layers * tokens * (32 + 48)
    assert sizes["offload:block_in"] == sizes["full"]


def test_unrolling_the_scan_changes_nothing():
    config = replace(TINY, model__scan_unroll=2)
    params = random_params(TINY.model)
    np.testing.assert_allclose(
        logits(config.model, params, TOKENS), logits(TINY.model, params, TOKENS), atol=1e-5
    )


def test_scaled_rope_by_hand():
    """Llama 3.1's rule in float64, one frequency after the other."""
    config = replace(
        TINY,
        model__explicit_head_dim=64,
        model__rope_theta=5e5,
        model__rope_scaling_factor=8.0,
    ).model
    expected, kinds = [], set()
    for i in range(32):
        frequency = 5e5 ** (-2 * i / 64)
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            kinds.add("kept")
        elif wavelength > 8192 / 1:
            kinds.add("stretched")
            frequency /= 8
        else:
            kinds.add("between")
            smooth = (8192 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        expected.append(frequency)
    assert kinds == {"kept", "stretched", "between"}
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-6)


def test_heads_of_their_own_size():
    config = replace(TINY, model__explicit_head_dim=16, model__n_kv_heads=2).model
    params = random_params(config)
    assert params["layers"]["attn"]["wq"].shape == (2, 32, 4, 16)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert parameter_count(config) == count
    assert logits(config, params, TOKENS).shape == (3, 16, 64)
    expected = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)
