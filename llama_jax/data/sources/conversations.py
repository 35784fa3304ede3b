"""Instruction data: records to conversations, and these to tokens of which the answers count.

Four forms of records are known by their fields, each record for itself: Alpaca's (`instruction`,
`input`, `output`), ShareGPT's, which Vicuna took (`conversations` of `from` and `value`),
`messages` of `role` and `content`, and Guanaco's (`text` with the turns marked in it). What cannot
be used is counted by reason, never repaired by guessing.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from llama_jax.config import DataConfig
from llama_jax.data.sources.json_files import read_records
from llama_jax.data.sources.part import Example, Part, Tally, too_long
from llama_jax.errors import UserError, first_line
from llama_jax.text.answer_ends import count_answers
from llama_jax.text.chat_template import BEGIN, END, ChatTemplate, Encoded, Messages
from llama_jax.text.template_renderer import Refused
from llama_jax.text.templates import end_ids
from llama_jax.text.tokenizer_formats import MARK

ROLES = {
    **{"human": "user", "user": "user", "system": "system"},
    **{"gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"},
}
# What may follow what; "" is the beginning.
FOLLOWS = {
    **{"": ("system", "user"), "system": ("user",)},
    **{"user": ("assistant",), "assistant": ("user",)},
}
# What begins a turn of openassistant-guanaco.
_GUANACO = re.compile(r"### (Human|Assistant):")
EMPTY = {"assistant": "an empty answer", "user": "an empty question"}
_DROPPED = str.maketrans("", "", MARK + BEGIN + END)  # letters that no template gets
BEGINS_WITH_ANSWER = "an answer before the first question, which is left out"


class Unusable(Exception):
    """A record that cannot be trained on: the reason, and more of it that is not counted by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def messages_of(record: Any) -> Messages:
    """The conversation in a record: a system message or none, then questions and answers in turn.

    One of Alpaca's has `instruction` and `input` in its question besides the `content` of both.

    Raises:
      Unusable: it has none of the known forms, lacks a field, or its roles are out of order.
    """
    if not isinstance(record, dict):
        raise Unusable("a record without fields")
    if "conversations" in record:
        return _turns(record["conversations"], "conversations", "from", "value")
    if "messages" in record:
        return _turns(record["messages"], "messages", "role", "content")
    if _GUANACO.match(str(record.get("text"))):
        return _marked(record["text"])
    if "instruction" not in record:
        raise Unusable("no field instruction, conversations or messages")
    question, answer = _text(record, "instruction"), _text(record, "output")
    more = "" if record.get("input") is None else _text(record, "input")
    content = f"{question}\n\n{more}" if more else question
    return [
        {"role": "user", "content": content, "instruction": question, "input": more},
        {"role": "assistant", "content": answer},
    ]


def _turns(turns: Any, field: str, role: str, content: str) -> Messages:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable(f"no list of messages in field {field!r}")
    messages: Messages = []
    for turn in turns:
        name = _text(turn, role)
        if name not in ROLES:
            raise Unusable(f"an unknown {role}", repr(name[:40]))
        messages.append({"role": ROLES[name], "content": _text(turn, content)})
    return messages


def _marked(text: str) -> Messages:
    """Turns that are told apart by Guanaco's marks; white space around each is no part of it."""
    _, *parts = _GUANACO.split(text)
    return [
        {"role": ROLES[name.lower()], "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _text(record: dict[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise Unusable(f"no text in field {field!r}")
    return value


def check_turns(messages: Messages) -> Messages:
    """The messages from the first question on; Vicuna's, too, are without an answer before it.

    Raises:
      Unusable: roles are out of order, an answer or a question is empty, or there is no answer.
    """
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Unusable("no answer")
    first = 1 if roles[0] == "system" else 0
    if roles[first] == "assistant":
        messages = messages[:first] + messages[first + 1 :]
        return check_turns(messages)
    before = ""
    for message in messages:
        role = message["role"]
        if role not in FOLLOWS[before]:
            raise Unusable("roles out of order", f"{role} after {before}" if before else role)
        if role in EMPTY and not message["content"].strip():
            raise Unusable(EMPTY[role])
        before = role
    return messages


def examples(
    part: Part, data: DataConfig, template: ChatTemplate, seq_len: int, tally: Tally
) -> Iterator[Example]:
    """Streams the conversations of a part as tokens; what cannot be used is counted in `tally`.

    So is what the template leaves out. One longer than a sequence is cut there, and all end with
    their last token that counts: what follows would train nothing. Each example says how many of
    its answers end in no end token.

    Args:
      part: of JSON.
      data: how to read.
      template: how to write.
      seq_len: inputs in a sequence; an example has one token more at most.
      tally: takes the counts.

    Raises:
      UserError: a file cannot be opened, or the template does not say what an answer is.
    """
    ends = frozenset(end_ids(template))
    for record, where in read_records(part, data, tally):
        try:
            found = messages_of(record)
            messages = check_turns(found)
            key = _checked(messages, data)
            encoded = template.example(messages)
            last = _last(encoded.counts)
            if not last:
                raise Unusable("the template writes no answer")
            kept = _last(encoded.counts[: seq_len + 1])
            if not kept:
                raise Unusable(f"all answers are beyond train.seq_len={seq_len}")
        except Unusable as error:
            tally.skip(error.reason, f"{where}: {error.detail}" if error.detail else where)
            continue
        except Refused as error:
            tally.skip("the template does not take it", f"{where}: {first_line(error)}")
            continue
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if role := _not_written(messages, encoded.text):
            tally.change(f"a message of the {role} that the template does not write so", where)
        if len(messages) < len(found):
            tally.change(BEGINS_WITH_ANSWER, where)
        if kept < last:
            tally.change(f"longer than train.seq_len={seq_len}, and cut there", where)
        answers, unended = count_answers(encoded, seq_len + 1, ends)
        example = _example(encoded, kept + 1, key)
        yield dataclasses.replace(example, answers=answers, unended=unended)


def _checked(messages: Messages, data: DataConfig) -> bytes:
    """What tells one conversation from another, whatever template it is written with.

    Raises:
      Unusable: it is too long, or holds half of a surrogate pair, which is no Unicode text.
    """
    contents = [[message["role"], message["content"]] for message in messages]
    try:
        key = json.dumps(contents, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Unusable("invalid UTF-8") from error
    if len(key) > data.max_document_bytes:
        raise Unusable(too_long(data))
    return key


def _not_written(messages: Messages, text: str) -> str:
    """The role of the first message whose words are not in the text; empty: all are there."""
    written = text.replace(MARK, "")
    for message in messages:
        words: str = message["instruction" if "instruction" in message else "content"]
        if words.translate(_DROPPED).strip() not in written:
            return message["role"]
    return ""


def _last(counts: np.ndarray) -> int:
    """The last token that counts; 0 without one, as the first of all cannot be a target."""
    found = np.flatnonzero(counts)
    return int(found[-1]) if len(found) else 0


def _example(encoded: Encoded, n_tokens: int, key: bytes) -> Example:
    text = encoded.text[: int(encoded.stops[n_tokens - 1])]
    n_bytes = len(text.replace(MARK, "").encode())
    return Example(encoded.ids[:n_tokens], n_bytes, key, encoded.counts[:n_tokens])
