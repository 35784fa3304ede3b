"""Instruction data: turns records into conversations, and these into tokens with loss weights.

Four forms of records are recognised by their fields: Alpaca's (`instruction`, `input`, `output`),
ShareGPT's, which Vicuna used (`conversations` with `from` and `value`), `messages` with `role` and
`content`, and Guanaco's (`text` that contains marks for the turns). One file may mix the forms.
Records that cannot be used are counted by reason and never repaired by guessing.
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
# The roles that may follow each role; "" is the beginning of a conversation.
FOLLOWS = {
    **{"": ("system", "user"), "system": ("user",)},
    **{"user": ("assistant",), "assistant": ("user",)},
}
# The marks at the beginning of the turns in openassistant-guanaco.
_GUANACO = re.compile(r"### (Human|Assistant):")
EMPTY = {"assistant": "an empty answer", "user": "an empty question"}
_DROPPED = str.maketrans("", "", MARK + BEGIN + END)  # these never reach a template
BEGINS_WITH_ANSWER = "an answer before the first question, which is left out"


class Unusable(Exception):
    """Raised for a record that cannot be used for training.

    Attributes:
      reason: the reason, by which such records are counted.
      detail: further information on this record; records are not counted by it.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def messages_of(record: Any) -> Messages:
    """Returns the messages of the conversation in a record. Does not check their order.

    The question of an Alpaca record has the keys `instruction` and `input` besides `content`, which
    joins the two.

    Raises:
      Unusable: the record has none of the known forms, lacks a field, or has an unknown role.
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
    """Splits a text at Guanaco's marks into messages, without white space around them."""
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
    """Checks the order of the messages; returns them without answers before the first question.

    The training code of Vicuna also drops such answers.

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
    """Streams the conversations of a part as tokens.

    A conversation that is longer than a sequence is cut. Each example ends with its last token that
    counts in the loss, because the tokens behind it would train nothing.

    Args:
      part: what to read; a part of JSON.
      data: how to read it.
      template: the chat template that renders the conversations.
      seq_len: number of inputs of a sequence; an example has at most one token more.
      tally: receives the counts of records that are skipped or changed, and of messages that the
        template leaves out.

    Raises:
      UserError: a file cannot be opened, or the template does not mark the answers.
    """
    ends = frozenset(end_ids(template))
    for record, where in read_records(part, data, tally):
        try:
            recorded = messages_of(record)
            messages = check_turns(recorded)
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
            tally.skip("a conversation that the template rejects", f"{where}: {first_line(error)}")
            continue
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if role := _not_written(messages, encoded.text):
            tally.change(f"a message of the {role} that the template omits or changes", where)
        if len(messages) < len(recorded):
            tally.change(BEGINS_WITH_ANSWER, where)
        if kept < last:
            tally.change(f"longer than train.seq_len={seq_len}, and cut there", where)
        answers, unended = count_answers(encoded, seq_len + 1, ends)
        example = _example(encoded, kept + 1, key)
        yield dataclasses.replace(example, answers=answers, unended=unended)


def _checked(messages: Messages, data: DataConfig) -> bytes:
    """Checks a conversation; returns its key, which does not depend on the template.

    Raises:
      Unusable: the conversation is too long, or contains half of a surrogate pair, which is not
        Unicode text.
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
    """Returns the role of the first message that is missing in the text; empty: none is missing.

    Args:
      messages: the conversation.
      text: the conversation as the template renders it.
    """
    written = text.replace(MARK, "")
    for message in messages:
        words: str = message["instruction" if "instruction" in message else "content"]
        if words.translate(_DROPPED).strip() not in written:
            return message["role"]
    return ""


def _last(counts: np.ndarray) -> int:
    """Returns the index of the last token that counts, or 0: token 0 is never a target."""
    targets = np.flatnonzero(counts)
    return int(targets[-1]) if len(targets) else 0


def _example(encoded: Encoded, n_tokens: int, key: bytes) -> Example:
    text = encoded.text[: int(encoded.stops[n_tokens - 1])]
    n_bytes = len(text.replace(MARK, "").encode())
    return Example(encoded.ids[:n_tokens], n_bytes, key, encoded.counts[:n_tokens])
