"""Conversations in the terminal: what the model is given, what is forgotten, what is typed."""

import dataclasses
import re

import jax
import pytest

from llama_jax.chat import ChatTemplate
from llama_jax.continuation import additions
from llama_jax.converse import HELP, Conversation, converse
from llama_jax.decode import Sampling
from llama_jax.errors import UserError
from llama_jax.inference import InferenceModel
from tests.chat_templates import said
from tests.helpers import TINY, one_line_error, random_params, replace, run_command, save_checkpoint

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
SAMPLING = Sampling(max_tokens=6, temperature=0.9)
CONFIG = replace(TINY, model__vocab_size=300, train__seq_len=64)


@pytest.fixture
def open_conversation(tokenizer, one_device):
    model = InferenceModel(None, CONFIG, random_params(CONFIG.model), tokenizer, one_device, 64)
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate(TEMPLATE, "the template", tokenizer, tokens)
    with jax.set_mesh(one_device):
        yield lambda sampling=SAMPLING, **options: Conversation(
            model, template, sampling, **options
        )


def test_each_answer_sees_the_whole_conversation(open_conversation):
    talk = open_conversation(system="s")
    first = "".join(talk.answer("abc", pytest.fail))
    assert talk.messages == said("abc", first, system="s")
    second = "".join(talk.answer("d", pytest.fail))
    messages = said("abc", first, "d", system="s")
    assert talk.messages == [*messages, {"role": "assistant", "content": second}]
    # The same as asked for at once; the second draws are those of the next seed.
    ids = talk._template.encode(messages)
    sampling = dataclasses.replace(SAMPLING, seed=1)
    assert second == "".join(a.text for a in additions(talk._model, [ids], sampling, chunk=1))


def test_the_same_question_is_answered_anew(open_conversation):
    talk = open_conversation()
    answers = set()
    for _ in range(3):
        answers.add("".join(talk.answer("abc", pytest.fail)))
        talk.restart("")
    assert len(answers) > 1


def test_the_oldest_exchange_is_forgotten(open_conversation):
    talk = open_conversation(Sampling(max_tokens=25, temperature=0.9), system="s")
    kept_lengths, lost_lengths = [], []
    for number in range(1, 40):
        history = said("x" * number, "ok", "y", "ok", system="s")
        asked = [*history, *said("z")]
        length = len(talk._template.encode(asked))
        talk.messages, told = history, []
        next(talk.answer("z", told.append))
        if told:
            lost_lengths.append(length)
            assert told == ["(the oldest 2 messages no longer fit, and are forgotten)"]
            assert talk.messages[:-1] == said("y", "ok", "z", system="s")
        else:
            kept_lengths.append(length)
            assert talk.messages[:-1] == asked
    # There is room for an answer, and no more is forgotten than that takes.
    assert max(kept_lengths) == 64 - 25 and min(lost_lengths) == 64 - 25 + 1


def test_a_message_that_never_fits(open_conversation):
    talk = open_conversation()
    "".join(talk.answer("a", pytest.fail))
    before = talk.messages
    with pytest.raises(UserError, match=r"the message has \d+ tokens .* context is 64; shorten"):
        next(talk.answer("x y z " * 40, pytest.fail))
    assert talk.messages == before


def test_what_is_typed(open_conversation, capsys):
    talk = open_conversation()
    converse(talk, ["", "  "])
    assert not talk.messages and not capsys.readouterr().out
    converse(talk, ["/help", "", "abc", "x y z " * 40, "/new", "/etc is a folder"])
    out, err = capsys.readouterr()
    assert out.startswith(HELP + "\n") and re.fullmatch(r"error: the message has .*\n", err)
    assert len(talk.messages) == 2 and talk.messages[0]["content"] == "/etc is a folder"
    converse(talk, ["/system be brief", "a", "/exit", "never"])
    assert talk.messages[:2] == said("a", system="be brief") and len(talk.messages) == 3
    assert capsys.readouterr().out == talk.messages[2]["content"] + " (cut: --max_tokens=6)\n"
    converse(talk, ["/new"])
    assert talk.messages == said(system="be brief")


@pytest.mark.parametrize(
    ("letters", "reason"), [(1, "--max_tokens=40"), (40, "the context is full")]
)
def test_why_an_answer_was_cut(open_conversation, letters, reason):
    talk = open_conversation(Sampling(max_tokens=40, temperature=0.0))
    "".join(talk.answer("x" * letters, pytest.fail))
    assert talk.cut == reason
    talk._model.__dict__["eos_ids"] = tuple(range(300))  # all of them end it
    "".join(talk.answer("x", lambda line: None))
    assert talk.cut == ""


def test_a_broken_off_answer_is_remembered(open_conversation, capsys, monkeypatch):
    talk = open_conversation()
    written = []

    def write(text="", **options):
        written.append(text)
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", write)
    converse(talk, ["abc"])
    assert written[2:] == [" (broken off)", ""]
    assert talk.messages == said("abc", "".join(written[:2]))


def test_the_command(tokenizer, tmp_path):
    params = random_params(CONFIG.model)
    run = save_checkpoint(tmp_path / "run", CONFIG, params, tokenizer.model_bytes)
    (tmp_path / "my.jinja").write_text(TEMPLATE)
    flags = (f"--checkpoint={run}", "--max_tokens=5", f"--chat_template={tmp_path / 'my.jinja'}")
    process = run_command("generate", *flags, "--chat", stdin="ab\n\nc\n/exit\n")
    assert process.returncode == 0 and process.stderr == "", process.stderr
    assert len(process.stdout.splitlines()) >= 2
    for bad, message in (
        (("--chat", "--prompt=x"), "give one of --prompt and --chat"),
        (("--chat", "--json"), "--json does not go with --chat"),
        (("--system=x",), "--system goes with --chat"),
    ):
        assert message in one_line_error(run_command("generate", *flags, *bad))
    plain = run_command("generate", f"--checkpoint={run}", "--chat")
    assert "has no chat template; --chat_template may be alpaca, " in one_line_error(plain)
