import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import UserError
from llama_jax.inference.logprobs import Scorer
from llama_jax.inference.perplexity import (
    Document,
    Totals,
    perplexity,
    read_texts,
    shard_document,
    text_document,
    windows,
)
from llama_jax.model.llama import logits
from tests.helpers import TINY, random_params

CONFIG = TINY.model
PARAMS = random_params(CONFIG)


@settings(max_examples=200, deadline=None)
@given(length=st.integers(2, 60), context=st.integers(1, 20), fraction=st.floats(0, 1, width=16))
def test_windows_score_each_token_once(length, context, fraction):
    stride = max(1, round(context * fraction))
    tokens = list(range(length))
    spans = list(windows(tokens, context, stride))
    assert [t for span in spans for t in span.tokens[-span.scored :]] == tokens[1:]
    for span in spans:
        assert len(span.tokens) <= context + 1
        assert list(span.tokens) == list(range(span.tokens[0], span.tokens[-1] + 1))
    for span in spans[1:]:
        assert len(span.tokens) - span.scored >= context - stride + 1


def test_the_windows_of_an_example():
    found = [(list(span.tokens), span.scored) for span in windows(range(9), 4, 2)]
    assert found == [([0, 1, 2, 3, 4], 4), ([2, 3, 4, 5, 6], 2), ([4, 5, 6, 7, 8], 2)]


@pytest.mark.parametrize("stride", [0, 9])
def test_strides_out_of_range(stride):
    with pytest.raises(UserError, match=r"--stride must be in 1..8"):
        list(windows(range(4), 8, stride))


def test_perplexities_by_hand(monkeypatch):
    rng = np.random.default_rng(0)
    lengths = (12, 1, 30, 5)
    documents = [Document(rng.integers(0, 64, n).tolist(), "zwei Wörter") for n in lengths]
    nll = 0.0
    for document in documents:
        # Scores each token with one full pass over its window.
        for at in range(1, len(document.tokens)):
            begin = 0 if at <= 8 else -(-(at - 8) // 3) * 3
            row = logits(CONFIG, PARAMS, np.array([document.tokens[begin:at]]))[0, -1]
            nll -= float(jax.nn.log_softmax(row)[document.tokens[at]])
    scorer = Scorer(CONFIG, PARAMS, context=8, batch_size=2)
    monkeypatch.setattr("llama_jax.inference.perplexity.BATCHES_AT_ONCE", 2)
    done = []
    totals = perplexity(scorer, iter(documents), 3, done.append)
    # A document of BOS alone has no token to score.
    assert totals == Totals(totals.nll, 3, 44, 6, 36)
    assert totals.nll == pytest.approx(nll, rel=1e-5)
    assert sum(done) == 44 and len(done) > 1
    results = totals.results()
    assert results["loss"] == totals.nll / 44
    assert results["token_perplexity"] == pytest.approx(math.exp(nll / 44), rel=1e-4)
    assert results["word_perplexity"] == pytest.approx(math.exp(nll / 6), rel=1e-3)
    assert results["byte_perplexity"] == pytest.approx(math.exp(nll / 36), rel=1e-4)
    assert results["bits_per_byte"] == pytest.approx(nll / 36 / math.log(2), rel=1e-5)


def test_nothing_and_too_much():
    assert math.isnan(Totals().results()["token_perplexity"])
    assert Totals(1e6, 1, 1, 1, 1).results()["word_perplexity"] == math.inf
    with pytest.raises(UserError, match="there is no text to evaluate"):
        perplexity(Scorer(CONFIG, PARAMS, 8, 2), [Document([1], "")], 4)


def test_documents_of_texts_and_of_shards(tokenizer):
    text = "abc def\nghi"
    document = text_document(text, tokenizer)
    assert document == Document([1, *tokenizer.encode(text)], text)
    assert shard_document(np.array([*document.tokens, 2], np.uint16), tokenizer) == document


def test_text_that_cannot_be_used_is_told(tmp_path, tokenizer, capsys):
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n{broken\n')
    model = SimpleNamespace(tokenizer=tokenizer)
    found = read_texts(f"{tmp_path}/x.jsonl", "text", model)
    assert len(list(found[""])) == 1
    assert capsys.readouterr().err.startswith("skipped  1 broken JSON line; the first: ")
