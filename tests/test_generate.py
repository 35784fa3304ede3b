import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.decode import Sampling, filter_logits, generate
from llama_jax.errors import UserError
from llama_jax.generate import complete
from llama_jax.inference import decoding_mesh
from llama_jax.model import logits
from tests.helpers import TINY, random_params, replace

CONFIG = replace(TINY, model__n_kv_heads=2).model
PARAMS = random_params(CONFIG)
GREEDY = Sampling(max_tokens=10, temperature=0.0)
NEVER = 10_000  # an end token that no model writes


def greedy_by_hand(prompt, count):
    """One full forward pass per token, no cache and no padding."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits(CONFIG, PARAMS, np.array([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


PROMPTS = [[1, 5, 9], [1, 7, 7, 30, 2, 8, 11], [1]]


@pytest.fixture(scope="module")
def expected():
    return [greedy_by_hand(prompt, 10) for prompt in PROMPTS]


def test_greedy_equals_full_forward_passes(expected):
    for prompt, want in zip(PROMPTS, expected, strict=True):
        assert generate(CONFIG, PARAMS, [prompt], GREEDY, context=64, eos_id=NEVER) == [want]


def test_a_batch_of_unequal_prompts_equals_each_alone(expected):
    assert generate(CONFIG, PARAMS, PROMPTS, GREEDY, context=64, eos_id=NEVER) == expected


def test_rows_end_at_the_end_token(expected):
    eos = expected[1][3]
    got = generate(CONFIG, PARAMS, PROMPTS, GREEDY, context=64, eos_id=eos)
    for answer, whole in zip(got, expected, strict=True):
        stop = whole.index(eos) + 1 if eos in whole else len(whole)
        assert answer == whole[:stop]
    assert len(got[1]) <= 4


def test_the_context_is_never_exceeded(expected):
    got = generate(CONFIG, PARAMS, PROMPTS, GREEDY, context=10, eos_id=NEVER)
    assert got == [answer[:3] for answer in expected]  # the longest prompt has 7 tokens


def test_the_same_seed_gives_the_same_tokens():
    def draw(seed):
        sampling = Sampling(max_tokens=20, temperature=1.5, top_p=1.0, seed=seed)
        return generate(CONFIG, PARAMS, PROMPTS, sampling, context=64, eos_id=NEVER)

    assert draw(0) == draw(0) != draw(1)


def test_each_token_is_a_new_draw():
    uniform = {**PARAMS, "lm_head": np.zeros_like(PARAMS["lm_head"])}
    sampling = Sampling(max_tokens=20, temperature=1.0, top_p=1.0)
    row = generate(CONFIG, uniform, [[1]], sampling, context=64, eos_id=NEVER)[0]
    assert len(set(row)) > 5


def test_draws_follow_the_model():
    """Frequencies of the first token over many rows against softmax of the logits."""
    rows = 4096
    sampling = Sampling(max_tokens=1, temperature=2.0, top_p=1.0)
    prompt = PROMPTS[1]
    drawn = generate(CONFIG, PARAMS, [prompt] * rows, sampling, context=64, eos_id=NEVER)
    counts = collections.Counter(row[0] for row in drawn)
    expected = jax.nn.softmax(logits(CONFIG, PARAMS, np.array([prompt]))[0, -1] / 2.0)
    observed = np.array([counts[token] for token in range(64)]) / rows
    # A frequency of 4,096 draws has a standard deviation of at most 0.008.
    np.testing.assert_allclose(observed, expected, atol=0.04)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [({"top_k": 1}, 1), ({"top_k": 3}, 3), ({"top_p": 1e-6}, 1)],
)
def test_knobs_reach_the_draws(sampling, allowed):
    sampling = Sampling(max_tokens=1, temperature=5.0, **{"top_p": 1.0, **sampling})
    drawn = generate(CONFIG, PARAMS, [PROMPTS[0]] * 256, sampling, context=64, eos_id=NEVER)
    likely = np.argsort(-logits(CONFIG, PARAMS, np.array([PROMPTS[0]]))[0, -1])[:allowed].tolist()
    assert {row[0] for row in drawn} == set(likely)


LOGITS = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, {0, 1, 2, 3}),
        (2, 1.0, {1, 3}),
        (9, 1.0, {0, 1, 2, 3}),
        (0, 0.39, {1}),
        (0, 0.41, {1, 3}),
        (0, 0.75, {1, 2, 3}),
        (1, 0.75, {1}),
        (0, 1e-9, {1}),
    ],
)
def test_top_k_and_top_p(top_k, top_p, kept):
    out = filter_logits(LOGITS, jnp.int32(top_k), jnp.float32(top_p))
    assert set(np.flatnonzero(np.isfinite(out[0])).tolist()) == kept
    np.testing.assert_array_equal(out[0, sorted(kept)], LOGITS[0, sorted(kept)])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        ([[1], []], "a prompt is empty"),
        ([[1] * 64], "has 64 tokens, but the model's context is 64"),
    ],
)
def test_prompts_that_cannot_be_continued(prompts, message):
    with pytest.raises(UserError, match=message):
        generate(CONFIG, PARAMS, prompts, GREEDY, context=64, eos_id=NEVER)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_knobs_out_of_range(field, value):
    with pytest.raises(UserError, match=field):
        Sampling(**{field: value})


def test_texts_go_in_and_come_out(tokenizer):
    config = replace(TINY, model__vocab_size=300).model
    params = random_params(config)
    texts = complete(config, params, tokenizer, ["abc d", ""], GREEDY, context=64)
    assert texts[0].startswith("abc d") and len(texts[0]) > 5
    ids = generate(config, params, [[1, *tokenizer.encode("abc d")]], GREEDY, context=64, eos_id=2)[
        0
    ]
    ids = [token for token in ids if token not in (1, 2)]
    assert texts[0] == tokenizer.decode([*tokenizer.encode("abc d"), *ids])


@pytest.mark.parametrize(("kv_heads", "tensor"), [(4, 4), (2, 2), (1, 1)])
def test_decoding_uses_as_many_devices_as_divide(kv_heads, tensor):
    mesh = decoding_mesh(replace(TINY, model__n_kv_heads=kv_heads).model)
    assert mesh.shape["tensor"] == mesh.size == tensor


def test_sharded_decoding_gives_the_same_tokens(expected):
    from llama_jax.sharding import param_shardings

    mesh = decoding_mesh(CONFIG)
    assert mesh.size == 2
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
        got = generate(CONFIG, params, PROMPTS, GREEDY, context=64, eos_id=NEVER)
    assert got == expected
