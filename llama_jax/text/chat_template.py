"""Chat templates: from the messages of a conversation to the text that a model was tuned on.

A template is Jinja. It is rendered as `apply_chat_template` of transformers renders it, but within
limits (see `template_renderer`): it is the code of others. For training it also says which tokens
the model is to write: those that it has between `{% generation %}` and `{% endgeneration %}`, or,
where it has no such tags, what an answer adds to the prompt for it.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.errors import UserError, as_user_error, check_type
from llama_jax.text import template_renderer
from llama_jax.text.jinja_process import BEGIN, END
from llama_jax.text.template_renderer import Refused
from llama_jax.text.tokenizer import Tokenizer

DEFAULT = "default"
# The names under which a template finds the special tokens.
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_MARKS = re.compile(f"[{BEGIN}{END}]")
_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Messages = list[dict[str, Any]]  # of a conversation: {"role": "user", "content": TEXT}
Spans = list[tuple[int, int]]  # of letters: first, after the last


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation to train on.

    Attributes:
      text: as the template writes it.
      ids: its tokens, int32.
      counts: of each token, whether the model is to write it.
      stops: of each token, where it ends in the text.
      answers: of each answer, its first token that counts, and the one behind its last.
    """

    text: str
    ids: np.ndarray
    counts: np.ndarray
    stops: np.ndarray
    answers: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template with the tokenizer that it is for.

    Attributes:
      source: Jinja.
      name: what to call it in an error.
      tokenizer: reads what it renders.
      tokens: `bos_token`, `eos_token` and so on, which it may write.
    """

    source: str
    name: str
    tokenizer: Tokenizer
    tokens: Mapping[str, str]

    def render(self, messages: Messages, *, prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
          messages: the conversation.
          prompt: go on to where the model's next message begins.

        Raises:
          Refused: the template does not take such messages.
          UserError: it is not Jinja, or takes more time or memory than `template_renderer` allows.
        """
        return _MARKS.sub("", self._render(messages, prompt))

    def _render(self, messages: Messages, prompt: bool) -> str:
        """The text, with `BEGIN` and `END` around what stands in the tags."""
        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self.tokens,
        }
        return template_renderer.shared().render(self.source, self.name, variables)

    def encode(self, messages: Messages, *, special: bool = False) -> list[int]:
        """Token ids of a conversation; BOS is there if the template writes it.

        The template's special tokens are parsed, their names in the messages stay text.

        Args:
          messages: the conversation.
          special: parse names in the messages, too, as transformers does by default.

        Raises:
          UserError: as `render`.
        """
        guarded = messages if special else self._guarded(messages)
        return self.tokenizer.encode(self.render(guarded), special=True)

    def example(self, messages: Messages) -> Encoded:
        """A whole conversation as tokens, and which of them the model is to write.

        The tokens are those of the whole text; one counts if any letter of it is in an answer.

        Raises:
          Refused: the template does not take such messages.
          UserError: it is not Jinja, or has no tags and its prompts are not the beginning of what
            it writes for the whole.
        """
        guarded = self._guarded(messages)
        find = self._tagged if _TAG.search(self.source) else self._added
        text, answers = find(guarded)
        ids, spans = self.tokenizer.encode_spans(text)
        starts, stops = np.asarray(spans, np.int64).reshape(-1, 2).T
        # The first bytes of a letter that is made of several tokens have no width.
        widened = np.maximum(stops, starts + 1)
        counts, ranges = np.zeros(len(ids), bool), []
        for answer in answers:
            inside = np.zeros(len(ids), bool)
            for first, last in answer:
                inside |= (starts < last) & (widened > first)
            if inside.any():
                counts |= inside
                ranges.append((int(inside.argmax()), len(ids) - int(inside[::-1].argmax())))
        return Encoded(text, np.asarray(ids, np.int32), counts, stops, ranges)

    def _guarded(self, messages: Messages) -> Messages:
        """The messages, whose texts hold no name of a marker, however the template joins them."""
        try:
            return [
                {
                    key: _protected(one, self.tokenizer, _said(message))
                    for key, one in message.items()
                }
                for message in messages
            ]
        except RecursionError as error:
            raise Refused("the messages are nested too deeply") from error

    def _tagged(self, messages: Messages) -> tuple[str, list[Spans]]:
        """The text, and of each answer what the template has between its tags."""
        text, spans = self._between_tags(messages)
        number = sum(map(_said, messages))
        if number == 1:
            return text, [spans]
        if len(spans) == number:
            return text, [[span] for span in spans]
        ends = [0]  # spans of the messages up to each answer
        for index in filter(lambda index: _said(messages[index]), range(len(messages))):
            with contextlib.suppress(Refused):  # it does not take a part of them
                ends.append(len(self._between_tags(messages[: index + 1])[1]))
        if len(ends) <= number or ends != sorted(ends) or ends[-1] != len(spans):
            return text, [[span] for span in spans]
        return text, [spans[first:last] for first, last in itertools.pairwise(ends)]

    def _between_tags(self, messages: Messages) -> tuple[str, Spans]:
        """The text, and all that the template has between its tags."""
        answers: Spans = []
        pieces: list[str] = []
        start = length = 0
        marked = self._render(messages, False)
        for part in re.split(f"({_MARKS.pattern})", marked):
            if part == BEGIN:
                start = length
            elif part == END:
                answers.append((start, length))
            else:
                pieces.append(part)
                length += len(part)
        return "".join(pieces), answers

    def _added(self, messages: Messages) -> tuple[str, list[Spans]]:
        """The text, and what each answer adds to the prompt for it, up to the end of its turn."""
        text = self.render(messages, prompt=False)
        answers: list[Spans] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number])
            after = self.render(messages[: number + 1], prompt=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    f"{self.name} has no {{% generation %}}, and what it writes before an answer "
                    "is not the beginning of what it writes with it: it cannot say what the model "
                    "is to write; put {% generation %} and {% endgeneration %} around the answer"
                )
            # White space after the end of a turn separates turns, and is no part of the answer.
            kept = after.rstrip()
            ends = kept.endswith(tuple(self.tokenizer.marker_names))
            answers.append([(len(before), len(kept) if ends else len(after))])
        return text, answers

    def check(self) -> None:
        """Raises `UserError` if it is not Jinja, before there are messages to find it out."""
        template_renderer.shared().check(self.source, self.name)


def named_templates(given: Any) -> dict[str, str]:
    """Templates by name, from `chat_template` of a tokenizer_config.json: one, a list, or none.

    Raises:
      UserError: it is something else.
    """
    if not given:
        return {}
    if isinstance(given, str):
        return {DEFAULT: given}
    with as_user_error("chat_template of tokenizer_config.json"):
        found = {one["name"]: one["template"] for one in given}
        for name, template in found.items():
            check_type("a template's text", template, str)
            if not check_type("a template's name", name, str).isprintable():
                raise ValueError(f"{name!r} is no name of a template")
        return found


def special_tokens(config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """`bos_token` and so on, as a template wants them: of tokenizer_config.json, else our own."""
    found = {
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
    }
    for name in (f"{token}_token" for token in _TOKENS):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _said(message: dict[str, Any]) -> bool:
    """Whether the model says a message."""
    return message.get("role") == "assistant"


def _protected(value: Any, tokenizer: Tokenizer, answer: bool) -> Any:
    """A part of a message with its texts marked, and its keys that hold the name of a marker."""
    if isinstance(value, str):
        return tokenizer.protected(_MARKS.sub("", value), answer=answer)
    if isinstance(value, list):
        return [_protected(one, tokenizer, answer) for one in value]
    if isinstance(value, dict):
        names = tokenizer.marker_names
        return {
            tokenizer.protected(key, answer=answer)
            if isinstance(key, str) and any(name in key for name in names)
            else key: _protected(one, tokenizer, answer)
            for key, one in value.items()
        }
    return value
