"""The text of stages, and the config of each stage, against values written out by hand."""

import pytest

from llama_jax.config import MAX_STEPS, STAGED, Config, all_fields, replaced
from llama_jax.errors import UserError
from llama_jax.stages import parse, to_text
from tests.helpers import TINY, replace, with_adapters

# Llama 3's batches (arXiv:2407.21783, section 3.4.1): 4M tokens, then 8M, then 16M.
LLAMA3 = (
    "until 252M tokens: train.seq_len=4096 train.global_batch=1024; "
    "until 2.87T tokens: train.global_batch=1024"
)


def staged(text, config=TINY):
    return replace(config, train__stages=text)


def test_without_stages_a_run_has_one_config():
    assert [(s.start, s.stop) for s in TINY.stages] == [(0, MAX_STEPS)]
    assert TINY.at(0) is TINY and TINY.at(10**9) is TINY


def test_the_batches_of_llama_3():
    run = replace(Config(), train__seq_len=8192, train__global_batch=2048, train__stages=LLAMA3)
    first = -(-252_000_000 // (4096 * 1024))  # 61 steps; the last one passes 252M tokens
    seen = first * 4096 * 1024
    second = first - (seen - 2_870_000_000_000) // (8192 * 1024)
    assert [s.start for s in run.stages] == [0, first, second] == [0, 61, 342_162]
    shapes = [(s.config.train.seq_len, s.config.train.global_batch) for s in run.stages]
    assert shapes == [(4096, 1024), (8192, 1024), (8192, 2048)]
    assert [run.at(step).train.tokens_per_step >> 20 for step in (60, 61, second)] == [4, 8, 16]
    tokens = run.total(lambda one: one.train.tokens_per_step, second + 10)
    assert tokens == seen + (second - first) * 8192 * 1024 + 10 * 8192 * 2048
    assert all(s.config.train.stages == "" for s in run.stages)


def test_values_have_the_type_of_their_field_and_may_be_quoted():
    text = """until 3: optim.peak_lr=1 tied=
    """
    with pytest.raises(UserError, match="tied is not a field"):
        staged(text)
    run = staged(
        "until 3: data.mixture='web 3; books 1' peak_lr=2e-3\n"
        'until 5 steps: grad_accum=2 model.remat="save:q;offload:k" model.rope_truncate=False;'
    )
    one, two, rest = (stage.config for stage in run.stages)
    assert (one.data.mixture, one.optim.peak_lr, one.model.remat) == (
        "web 3; books 1",
        2e-3,
        "none",
    )
    assert (two.train.grad_accum, two.model.remat) == (2, "save:q;offload:k")
    assert two.model.rope_truncate is False and two.optim.peak_lr == TINY.optim.peak_lr
    assert rest == TINY
    assert run.of_weights(0) == one and run.of_weights(3) == one and run.of_weights(4) == two


def test_text_and_back():
    stages = [(3, {"data.mixture": "a 0.5; b 0.5", "optim.peak_lr": 1e-05}), (7, {})]
    text = to_text(stages)
    assert text == "until 3: data.mixture='a 0.5; b 0.5' optim.peak_lr=1e-05; until 7:"
    again = [(s.until, dict(s.values)) for s in parse(text)]
    assert again == [(3, {"data.mixture": "a 0.5; b 0.5", "optim.peak_lr": "1e-05"}), (7, {})]
    assert parse("") == [] == parse(" ; \n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "does not begin with 'until N:'"),
        ("until 5 train.seq_len=4", "does not begin with 'until N:'"),
        ("until: train.seq_len=4", "does not begin with 'until N:'"),
        ("until five: train.seq_len=4", "whole number of steps or tokens"),
        ("until 1.5: train.seq_len=4", "whole number of steps or tokens"),
        ("until 0: train.seq_len=4", "whole number of steps or tokens"),
        ("until -3: train.seq_len=4", "whole number of steps or tokens"),
        ("until 9e99: train.seq_len=4", "whole number of steps or tokens"),
        ("until 5 epochs: train.seq_len=4", "whole number of steps or tokens"),
        ("until 5: train.seq_len", "'train.seq_len' has no value"),
        ("until 5: seq_len=4 seq_len=4", "'seq_len' occurs twice"),
        ("until 5: seq_len=4 until 9: seq_len=8", "'until' begins a new stage; write a semicolon"),
        ("until 5: seq_len=4 train.seq_len=4", "train.seq_len occurs twice"),
        ("until 5: data.mixture='web=1", "a quote ' without its end"),
        (
            "until 5: ; until 4: train.seq_len=4",
            r"stage 2 \(until 4\) ends before it begins, at step 5",
        ),
        ("until 5: ; until 5:", r"stage 2 \(until 5\) ends before it begins"),
        ("until 9: ; until 4096 tokens:", r"ends before it begins, at 4,608 tokens, step 9"),
        ("until 5: model.dim=4", "model.dim cannot change in a run"),
        ("until 5: dim=4", "dim cannot change in a run"),
        ("until 5: optim.moment_dtype=bfloat16", "moment_dtype cannot change in a run"),
        ("until 5: train.log_every=4", "train.log_every cannot change in a run"),
        (
            "until 5: nothing_like_it=4",
            "is not a field; docs/stages.md lists the fields of a stage",
        ),
        ("until 5: optim.peek_lr=4", r"is not a field; did you mean optim.peak_lr\?"),
        ("until 5: optim.peak_lr=fast", "optim.peak_lr must be of type float, got 'fast'"),
        ("until 5: train.seq_len=4.5", "train.seq_len must be of type int, got '4.5'"),
        ("until 5: model.rope_truncate=maybe", "model.rope_truncate must be of type bool"),
        ("until 5: optim.peak_lr=-1", r"stage 1 \(until 5\): optim.peak_lr must be positive"),
        ("until 5: optim.peak_lr=nan", "optim.peak_lr must be finite"),
        ("until 5: global_batch=7 grad_accum=2", "train.global_batch=7 is not a multiple of"),
        ("until 5: optim.warmup_steps=20", "optim.warmup_steps=20 must be less than"),
    ],
)
def test_a_mistake_is_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        staged(text)
    assert "train.stages" in str(caught.value) and "\n" not in str(caught.value)


def test_combinations_that_cannot_be():
    with pytest.raises(UserError, match="data.streaming needs .* no data.mixture"):
        replace(TINY, data__source="x", data__streaming=True, train__stages="until 5: mixture=a=1")
    with pytest.raises(UserError, match=r"with adapters .* no stage .* may set model.rope_"):
        staged("until 5: rope_theta=1e6", with_adapters(TINY))
    staged("until 5: lora.dropout=0.5", with_adapters(TINY))


def test_staged_fields_exist_and_short_names_are_unique():
    assert set(STAGED) <= set(all_fields())
    short = [name.rpartition(".")[2] for name in STAGED]
    assert len(set(short)) == len(short)


def test_replaced_checks_the_result():
    changed = replaced(TINY, {"train.steps": 5, "init_from": "hf:x", "train.seq_len": 8})
    assert (changed.train.steps, changed.train.seq_len, changed.init_from) == (5, 8, "hf:x")
    with pytest.raises(UserError, match="train.steps must be positive"):
        replaced(TINY, {"train.steps": 0})
