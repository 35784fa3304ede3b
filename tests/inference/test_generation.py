import re

import jax
import pytest

from llama_jax.inference.decode import Sampling, generate
from llama_jax.inference.generation import NewText, Stopwatch, complete, new_texts, show_in_order
from llama_jax.inference.loaded_model import InferenceModel
from llama_jax.text.tokenizer import Tokenizer
from tests.helpers import (
    TINY,
    llama3_tokenizer,
    one_line_error,
    random_params,
    replace,
    run_command,
    save_checkpoint,
)

GREEDY = Sampling(max_tokens=10, temperature=0.0)


def model_of(tokenizer, one_device):
    config = replace(TINY, model__vocab_size=tokenizer.vocab_size, train__seq_len=64)
    return InferenceModel(None, config, random_params(config.model), tokenizer, one_device, 64)


def test_texts_go_in_and_come_out(tokenizer):
    config = replace(TINY, model__vocab_size=300).model
    params = random_params(config)
    texts = complete(config, params, tokenizer, ["abc d", ""], GREEDY, context=64)
    assert texts[0].startswith("abc d") and len(texts[0]) > 5
    prompt = [1, *tokenizer.encode("abc d")]
    ids = generate(config, params, [prompt], GREEDY, context=64, eos_id=2)[0]
    ids = [token for token in ids if token not in (1, 2)]
    assert texts[0] == tokenizer.decode([*tokenizer.encode("abc d"), *ids])


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_what_comes_piece_by_piece_is_the_whole(kind, tokenizer, corpus, one_device):
    if kind == "json":
        tokenizer = Tokenizer(llama3_tokenizer(corpus))
    model = model_of(tokenizer, one_device)
    # Many rows, so that some begin with a space and some end in half a character.
    prompts, sampling = (
        ["abc d", "é 🦙", *[""] * 22],
        Sampling(max_tokens=40, temperature=3.0, top_p=1.0),
    )
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    with jax.set_mesh(one_device):
        found = list(new_texts(model, ids, sampling, chunk=1))
        whole = complete(model.config.model, model.params, tokenizer, prompts, sampling, context=64)
    texts = ["".join(a.text for a in found if a.row == row) for row in range(24)]
    # For a cut character, SentencePiece marks each byte; Python's decoder marks the rest once.
    got = [p + text for p, text in zip(prompts, texts, strict=True)]
    assert [re.sub("\ufffd+", "?", t) for t in got] == [re.sub("\ufffd+", "?", t) for t in whole]
    assert any("\ufffd" in text for text in texts)  # random bytes are rarely valid UTF-8
    ended = [[a.ended for a in found if a.row == row] for row in range(24)]
    assert all(row[-1] and not any(row[:-1]) for row in ended)
    assert max(a.part for a in found) <= 40


def test_a_row_that_ends_first_waits_for_its_turn():
    found = [
        NewText(0, "a", 1, False, 0),
        NewText(1, "x", 1, True, 0),
        NewText(0, "b", 1, True, 1),
        NewText(2, "y", 1, False, 1),
        NewText(2, "z", 1, True, 2),
    ]
    written = []
    passed = list(show_in_order(["A", "B", "C"], iter(found), written.append, first=4))
    assert passed == found
    assert written == [
        *("--- 5 ---\nA", "a", "b", "\n", "--- 6 ---\nBx", "\n"),
        *("--- 7 ---\nC", "y", "z", "\n"),
    ]


def test_one_prompt_has_no_heading():
    written = []
    list(show_in_order(["A"], iter([NewText(0, "a", 1, True, 0)]), written.append))
    assert written == ["A", "a", "\n"]


def test_tokens_per_second(monkeypatch):
    now = iter([0.0, 2.0, 2.0, 3.0, 4.0, 14.0])
    monkeypatch.setattr("llama_jax.inference.generation.time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    rows = [(0, 0), (1, 0), (0, 1), (1, 1)]
    watch.count(NewText(row, "", 5, False, part) for row, part in rows)
    watch.count(iter([NewText(0, "", 50, False, 0)]))
    # 60 tokens in the 12 seconds after the first pieces of the first batch.
    assert watch.summary() == (
        "70 new tokens; the first after 2.00 s (compilation included), then 5.0 tokens/s"
    )


def test_a_damaged_step_is_one_line(tokenizer, tmp_path):
    """Orbax finds no arrays in a cut file; its own tracebacks must not be printed as well."""
    config = replace(TINY, model__vocab_size=tokenizer.vocab_size)
    params = random_params(config.model)
    step = save_checkpoint(tmp_path, config, params, tokenizer.model_bytes) / "checkpoints" / "0"
    files = [file for file in (step / "params").rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    said = one_line_error(run_command("generate", f"--checkpoint={step}", "--prompt=a"))
    assert f"{step} differs from what was saved: params/" in said and largest.name in said
