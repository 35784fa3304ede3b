"""Untrusted templates: whatever they compute, the result is a text or a one-line error."""

import os
import signal
import subprocess
import sys

import pytest

from llama_jax.errors import UserError
from llama_jax.text import jinja_process, template_renderer
from llama_jax.text.chat_template import ChatTemplate
from llama_jax.text.template_renderer import Exceeded, Refused, Renderer
from llama_jax.text.templates import end_ids
from tests.helpers import until

MESSAGES = [{"role": "user", "content": "a"}]
GOOD = "{% for message in messages %}{{ message.content }}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s {} ns.s %}"
    "{% endfor %}{{ ns.s }}"
)
GREEDY = {
    "a long text": "{{ 'a' * n * n }}",
    "a constant, folded by the compiler": "{{ 'a' * 10000000000 }}",
    "a list": "{{ ([0] * n * n)|length }}",
    "doubling by +": DOUBLING.replace("{}", "+"),
    "doubling by ~": DOUBLING.replace("{}", "~"),
    "a list that grows": "{% set ns = namespace(s=[0]) %}{% for i in range(99) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "a width": "{{ '%10000000000d' % 1 }}",
    "a width of format": "{{ '{:10000000000}'.format(1) }}",
    "padding": "{{ 'a'.ljust(n * n) }}",
    "a filter": "{{ 'a'|center(n * n) }}",
    "a replacement": "{{ ('a' * n).replace('', 'a' * n) }}",
    "the text itself": "{% set s = 'a' * n * 100 %}{% for i in range(99) %}{{ s }}{% endfor %}",
    "batches": "{{ [1]|batch(n * n, 0)|list|length }}",
}
SLOW = {
    "loops": "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}",
    "a power": "{{ n ** (n ** 2) > 1 }}",
    "a constant power": "{{ 9 ** (9 ** 9) > 1 }}",
}
WRONG = {
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "nested brackets": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "an attribute of nothing": "{{ messages.none.none }}",
    "an attribute that raises": "{{ [1]|map('upper')|first }}{{ 1|dictsort }}",
    "a wrong type": "{{ messages + 1 }}",
    "a division": "{{ 1 / 0 }}",
    "an index": "{{ messages[7].content }}",
    "an internal": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "an exception of its own": "{{ raise_exception('no\nway') }}",
    "a format of its own": "{{ strftime_now(1) }}",
    "no Jinja": "{% for %}",
    "an unknown filter": "{{ 1|unknown }}",
    "half a surrogate": "{{ '\\ud800'.encode() }}",
}


@pytest.fixture(scope="module")
def limited():
    return Renderer(seconds=1, memory=2**28)


def outcome(limited, source):
    variables = {"messages": MESSAGES, "n": 99_999}
    with pytest.raises(UserError) as caught:
        limited.render(source, "the template of a stranger", variables)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("the template of a stra")
    assert limited.render(GOOD, "it", variables) == "a"  # still usable
    return caught.value


@pytest.mark.parametrize("kind", GREEDY)
def test_memory_has_a_limit(limited, kind):
    error = outcome(limited, GREEDY[kind])
    # The library may refuse a far too large size before it allocates memory.
    refused = isinstance(error, Refused) and "too" in str(error)
    assert refused or "MiB of memory" in str(error) or "characters" in str(error), error


@pytest.mark.parametrize("kind", SLOW)
def test_time_has_a_limit(limited, kind):
    assert "takes more than 1 s of processor time" in str(outcome(limited, SLOW[kind]))


@pytest.mark.parametrize("kind", WRONG)
def test_what_a_template_raises_is_one_line(limited, kind):
    assert "status" not in str(outcome(limited, WRONG[kind]))


def test_a_template_that_is_only_compiled_has_the_same_limits(limited):
    with pytest.raises(UserError, match="processor time"):
        limited.check(SLOW["a constant power"], "it")


def test_a_template_without_end_is_told_when_its_ends_are_looked_for(tokenizer, monkeypatch):
    """The time limit is reported at once; other conversations are not tried as well."""
    asked = []

    def ask(self, request, name):
        asked.append(name)
        raise Exceeded(f"{name} takes more than 1 s of processor time")

    monkeypatch.setattr(Renderer, "_ask", ask)
    with pytest.raises(Exceeded, match="the template takes more than 1 s"):
        end_ids(ChatTemplate(SLOW["loops"], "the template", tokenizer, {}))
    assert len(asked) == 1


def test_messages_that_are_no_json_are_refused(limited):
    with pytest.raises(Refused, match="it takes only JSON messages: .*not JSON serializable"):
        limited.render(GOOD, "it", {"messages": [{"content": b"bytes"}]})
    assert limited.render(GOOD, "it", {"messages": MESSAGES}) == "a"


def test_letters_of_all_kinds_come_back(limited):
    text = "é 日本 \U0001f600 \ud800 \0 \r\n"
    messages = [{"role": "user", "content": text}]
    assert limited.render(GOOD, "it", {"messages": messages}) == text


def test_a_process_that_was_killed_is_named_and_replaced(limited, monkeypatch):
    assert limited.render(GOOD, "it", {"messages": MESSAGES}) == "a"
    read = jinja_process.read_message

    def killed(stream):
        limited._process.kill()
        return read(stream)

    monkeypatch.setattr(jinja_process, "read_message", killed)
    limited._process.send_signal(signal.SIGSTOP)  # it must not answer before the kill
    with pytest.raises(UserError, match=r"ends the process that renders it \(status -9\)"):
        limited.render(GOOD, "it", {"messages": MESSAGES})
    monkeypatch.undo()
    assert limited.render(GOOD, "it", {"messages": MESSAGES}) == "a"


def test_an_interrupt_leaves_no_answer_behind(limited, monkeypatch):
    def interrupted(stream):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(jinja_process, "read_message", interrupted)
        with pytest.raises(KeyboardInterrupt):
            limited.render("the first", "it", {})
    assert limited.render("the second", "it", {}) == "the second"


def test_a_fork_has_a_renderer_of_its_own(monkeypatch):
    mine = template_renderer.shared()
    assert template_renderer.shared() is mine
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a fork
    assert template_renderer.shared() is not mine


def test_the_process_ends_with_its_parent():
    program = (
        "from llama_jax.text.template_renderer import shared\n"
        "shared().check('a', 'it'); print(shared()._process.pid, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    ran = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert ran.returncode == -signal.SIGKILL

    def ended():
        try:
            os.kill(int(ran.stdout), 0)
        except ProcessLookupError:
            return True
        return False

    until(ended)
