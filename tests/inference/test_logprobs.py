import jax
import numpy as np
import pytest

from llama_jax.inference import logprobs as logprobs_lib
from llama_jax.inference.logprobs import Scorer, Span
from llama_jax.model.llama import logits
from llama_jax.parallel.sharding import param_shardings
from tests.helpers import TINY, mesh_of, random_params, replace

CONFIG = replace(TINY, model__n_kv_heads=2).model
PARAMS = random_params(CONFIG)
LENGTHS = (5, 40, 2, 17, 33, 9, 16, 300)


def spans_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Span(rng.integers(0, 64, n).tolist(), int(rng.integers(1, n))) for n in lengths]


def by_hand(span):
    """Computes log-probabilities from all logits of one unpadded row, and whether each is top."""
    tokens = np.array(span.tokens)
    all_logits = np.asarray(logits(CONFIG, PARAMS, tokens[None, :-1])[0], np.float64)
    totals = np.log(np.exp(all_logits).sum(axis=-1))
    logprobs = all_logits[np.arange(len(tokens) - 1), tokens[1:]] - totals
    greedy = all_logits.argmax(axis=-1) == tokens[1:]
    return logprobs[-span.scored :], greedy[-span.scored :]


def with_likely_ends(spans):
    """Returns the spans with the likeliest last token, so that not all tokens are unlikely."""
    return [
        Span(
            [
                *s.tokens[:-1],
                int(np.asarray(logits(CONFIG, PARAMS, np.array([s.tokens[:-1]])))[0, -1].argmax()),
            ],
            s.scored,
        )
        for s in spans
    ]


def check(scores, spans):
    for score, span in zip(scores, spans, strict=True):
        logprobs, greedy = by_hand(span)
        assert len(score.logprobs) == span.scored
        np.testing.assert_allclose(score.logprobs, logprobs, atol=5e-5)
        np.testing.assert_array_equal(score.greedy, greedy)
        assert score.greedy[-1]


def test_scores_of_unequal_spans():
    spans, done = with_likely_ends(spans_of(LENGTHS)), []
    scores = Scorer(CONFIG, PARAMS, context=300, batch_size=3)(spans, done.append)
    check(scores, spans)
    assert sum(done) == len(spans) and len(done) == 3


@pytest.mark.parametrize("shape", [(1, 2, 1, 2), (2, 1, 1, 2), (1, 4, 1, 1)])
def test_scores_on_a_mesh(shape):
    spans, mesh = with_likely_ends(spans_of(LENGTHS)), mesh_of(shape)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
        scores = Scorer(CONFIG, params, context=300, batch_size=3)(spans)
    check(scores, spans)


def test_few_shapes_are_compiled():
    config = replace(TINY, model__rope_theta=7.0).model  # a model that no other test compiles
    spans = spans_of(range(4, 130), seed=1)  # the last batch is not full
    before = logprobs_lib.token_logprobs._cache_size()
    Scorer(config, random_params(config), 200, 4)(spans)
    # Lengths of 3 to 128 inputs are padded to 16, 32, 64 or 128, in any order and last batch.
    assert logprobs_lib.token_logprobs._cache_size() - before == 4


def test_all_logits_never_exist():
    """The program has arrays of one chunk x vocabulary, never of all tokens x vocabulary."""
    config = replace(TINY, model__vocab_size=1024).model
    ids = jax.ShapeDtypeStruct((2, 1024), "int32")
    params = jax.eval_shape(lambda: random_params(config))
    lowered = logprobs_lib.token_logprobs.lower(config, params, ids, ids)
    text = lowered.as_text()
    assert f"2x{logprobs_lib.CHUNK}x1024xf32" in text
    assert "2x1024x1024xf32" not in text


@pytest.mark.parametrize(("tokens", "scored"), [(2, 2), (2, 0), (1, 1)])
def test_what_cannot_be_scored(tokens, scored):
    with pytest.raises(ValueError, match="cannot be scored"):
        Span(list(range(tokens)), scored)


def test_longer_than_the_context():
    with pytest.raises(ValueError, match=r"more than 8 \+ 1 tokens"):
        Scorer(CONFIG, PARAMS, context=8, batch_size=1)([Span(list(range(10)), 1)])


def test_nothing_to_score():
    assert Scorer(CONFIG, PARAMS, context=8, batch_size=1)([]) == []
