import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.inference import decode
from llama_jax.inference.decode import Sampling, filter_logits, generate, stream_tokens
from llama_jax.model.llama import logits
from llama_jax.parallel.sharding import param_shardings
from tests.helpers import TINY, mesh_of, random_params, replace

CONFIG = replace(TINY, model__n_kv_heads=2).model
PARAMS = random_params(CONFIG)
GREEDY = Sampling(max_tokens=10, temperature=0.0)
NEVER = 10_000  # an end token that no model writes


def greedy_by_hand(prompt, count):
    """Decodes greedily with one full forward pass per token, without cache or padding."""
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


def test_a_program_stops_at_any_of_several_end_tokens(expected):
    eos = expected[1][3]
    tokens, lengths = np.zeros((1, 16), np.int32), np.array([7], np.int32)
    tokens[0, -7:] = PROMPTS[1]
    state = decode._prefill(CONFIG, 32, PARAMS, tokens, lengths)
    knobs = (jnp.float32(0), jnp.int32(0), jnp.float32(1))
    fixed = (jnp.int32(10), jax.random.key(0), knobs, jnp.int32(CONFIG.vocab_size))
    _, state = decode._decode(CONFIG, 10, PARAMS, state, jnp.array([NEVER, eos]), *fixed)
    assert state.step == expected[1].index(eos) + 1


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
    """The frequencies of the first token over many rows follow the softmax of the logits."""
    rows = 4096
    sampling = Sampling(max_tokens=1, temperature=2.0, top_p=1.0)
    prompt = PROMPTS[1]
    drawn = generate(CONFIG, PARAMS, [prompt] * rows, sampling, context=64, eos_id=NEVER)
    counts = collections.Counter(row[0] for row in drawn)
    expected = jax.nn.softmax(logits(CONFIG, PARAMS, np.array([prompt]))[0, -1] / 2.0)
    observed = np.array([counts[token] for token in range(64)]) / rows
    # A frequency over 4,096 draws has a standard deviation of at most 0.008.
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


def answers(chunks, rows):
    """Returns the tokens of each row from the chunks of `stream_tokens`."""
    found = [[] for _ in range(rows)]
    for chunk in chunks:
        for row, new in zip(found, chunk, strict=True):
            row.extend(new)
    return found


@pytest.mark.parametrize("chunk", [1, 3])
def test_tokens_do_not_depend_on_the_pieces(chunk):
    sampling = Sampling(max_tokens=10, temperature=1.5)
    whole = generate(CONFIG, PARAMS, PROMPTS, sampling, context=64, eos_id=5)
    chunks = list(
        stream_tokens(CONFIG, PARAMS, PROMPTS, sampling, context=64, eos_id=5, chunk=chunk)
    )
    assert answers(chunks, 3) == whole
    assert all(len(new) <= chunk for found in chunks for new in found)
    assert len(chunks) == -(-max(map(len, whole)) // chunk)


def test_streaming_compiles_one_program():
    prompts = [PROMPTS[0]]
    list(stream_tokens(CONFIG, PARAMS, prompts, GREEDY, context=64, eos_id=NEVER, chunk=2))
    before = decode._decode._cache_size()
    list(stream_tokens(CONFIG, PARAMS, [PROMPTS[1]], GREEDY, context=64, eos_id=NEVER, chunk=2))
    assert decode._decode._cache_size() == before


def is_greedy(config, params, prompt, answer):
    """Returns whether one pass over the whole answer finds each of its tokens the likeliest."""
    tokens = np.array([[*prompt, *answer]])
    likeliest = logits(config, params, tokens)[0].argmax(axis=-1)[len(prompt) - 1 : -1]
    return likeliest.tolist() == answer


LONG = np.random.default_rng(0).integers(0, 64, 600).tolist()


@pytest.mark.parametrize("window", [0, 24])
def test_long_prompts_and_answers(window):
    """Prompts may exceed one prefill piece, and answers the room in the cache of a window."""
    config = dataclasses.replace(CONFIG, sliding_window=window)
    sampling = Sampling(max_tokens=300, temperature=0.0)
    assert len(LONG) > decode.PREFILL and sampling.max_tokens > decode.ROOM
    prompts = [LONG, PROMPTS[0]]
    found = generate(config, PARAMS, prompts, sampling, context=2000, eos_id=NEVER)
    for prompt, answer in zip(prompts, found, strict=True):
        assert len(answer) == 300
        assert is_greedy(config, PARAMS, prompt, answer)


def test_the_cache_of_a_window_is_little_more_than_the_window():
    config = dataclasses.replace(CONFIG, sliding_window=4096)
    assert decode.cache_slots(CONFIG, 32_768, 1024) == 33_792
    assert decode.cache_slots(config, 32_768, 1024) == 4096 + 512
    assert decode.cache_slots(config, 16, 16) == 32


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 2, 1, 2), (2, 1, 1, 1)])
def test_sharded_decoding_gives_the_same_tokens(expected, shape):
    """The mesh may also divide the batch, and three prompts need not divide evenly."""
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
        chunks = list(
            stream_tokens(CONFIG, params, PROMPTS, GREEDY, context=64, eos_id=NEVER, chunk=4)
        )
    assert answers(chunks, 3) == expected
    assert len(chunks) == 3


def test_a_mesh_for_training_is_refused():
    with jax.set_mesh(mesh_of((1, 1, 2, 1))), pytest.raises(UserError, match="context=2"):
        generate(CONFIG, PARAMS, PROMPTS, GREEDY, context=64, eos_id=NEVER)


@pytest.mark.parity
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 1, "rope_theta": 500_000.0},
        {"tied_embeddings": True},
        {"sliding_window": 7},
    ],
    ids=["llama", "grouped", "tied", "window"],
)
def test_greedy_equals_transformers(changes):
    import transformers

    from tests.reference import hf_reference

    config = dataclasses.replace(TINY.model, **changes)
    params = random_params(config)
    theirs = hf_reference.build(dataclasses.replace(config, sliding_window=0), params)
    if config.sliding_window:
        fields = {**theirs.config.to_dict(), "sliding_window": config.sliding_window}
        fields = {name: value for name, value in fields.items() if name != "model_type"}
        weights = theirs.state_dict()
        theirs = transformers.MistralForCausalLM(transformers.MistralConfig(**fields)).float()
        theirs.load_state_dict(weights)
    expected = hf_reference.greedy(theirs, PROMPTS)
    sampling = Sampling(max_tokens=64, temperature=0.0)
    assert generate(config, params, PROMPTS, sampling, context=256, eos_id=NEVER) == expected


IDS = 40  # ids of the tokenizer; the other 24 rows of the model are padding


def with_loud_padding():
    """Returns `PARAMS` with padding rows, after the 40 ids, that are far likelier than any id."""
    params = {**PARAMS, "lm_head": PARAMS["lm_head"].copy()}
    params["embed"] = PARAMS["embed"].copy()
    params["embed"][:, 0] = 50.0  # a direction that every hidden state has
    params["lm_head"][:, IDS:] = 0.0
    params["lm_head"][0, IDS:] = 1000.0
    return params


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 2)])
def test_rows_without_an_id_are_never_drawn(shape):
    mesh, prompts = mesh_of(shape), [[1, 5]] * 64
    options = {"context": 64, "eos_id": NEVER}
    params = with_loud_padding()
    likely = np.argsort(-logits(CONFIG, params, np.array(prompts[:1]))[0, -1, :IDS])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, param_shardings(params, mesh))
        for knobs, first in [
            ({"temperature": 0.0}, likely[:1]),
            ({"temperature": 1e4}, likely),
            ({"temperature": 1e4, "top_k": 3}, likely[:3]),  # the likeliest ids, not rows
            ({"temperature": 1e4, "top_p": 2.5 / IDS}, likely[:3]),
        ]:
            sampling = Sampling(max_tokens=10, **{"top_p": 1.0, **knobs})
            every = generate(CONFIG, params, prompts, sampling, **options)
            assert max(token for row in every for token in row) >= IDS
            known = generate(CONFIG, params, prompts, sampling, n_ids=IDS, **options)
            assert max(token for row in known for token in row) < IDS
            assert {row[0] for row in known} <= set(first.tolist())


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": 1e-50},
        {"temperature": 1e39},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": math.nan},
        {"seed": 2**32},  # JAX would use seed 0
        {"seed": -(10**30)},
        {"top_k": 2**31},
        {"max_tokens": 10**30},
    ],
)
def test_sampling_that_no_device_could_do(odd):
    with pytest.raises(UserError, match=next(iter(odd))):
        Sampling(**odd)
