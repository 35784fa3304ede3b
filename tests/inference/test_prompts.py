import json

import pytest

from llama_jax.errors import UserError
from llama_jax.inference.prompts import read_messages, read_prompts


def test_prompts_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  \n two \r\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", " two "]
    lines = ["é\n", {"prompt": "b", "id": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_prompts(tmp_path / "a.jsonl") == ["é\n", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there is no prompt in"),
        ('"a"\n{"promt": "b"}', r"line 2: neither a string nor \{\"prompt\": TEXT\}"),
        ('"a"\n\n"b', "line 3: not JSON"),
        (None, "cannot read --prompts=.*p.jsonl"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / "p.jsonl")


HELLO = [{"role": "user", "content": "hello"}]


def test_conversations_from_a_file(tmp_path):
    two = [{"role": "system", "content": "é"}, {"role": "user", "content": [{"type": "text"}]}]
    (tmp_path / "a.jsonl").write_text(
        "\n".join(map(json.dumps, [HELLO, {"messages": two, "id": 1}]))
    )
    assert read_messages(tmp_path / "a.jsonl") == [HELLO, two]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there is no prompt in"),
        ('[{"role": "user"}]\n"hello"', "line 2: neither a list of messages"),
        ("[]", "line 1: neither a list of messages"),
        ('{"messages": [{"content": "hello"}]}', "line 1: neither a list of messages"),
        ('[{"role": "user"', "line 1: not JSON"),
        (None, "cannot read --messages=.*m.jsonl"),
    ],
)
def test_files_that_hold_no_conversations(tmp_path, content, message):
    if content is not None:
        (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_messages(tmp_path / "m.jsonl")
    assert "\n" not in str(caught.value)
