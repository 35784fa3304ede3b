"""Chat templates, which turn the messages of a conversation into the text that a model expects.

A template is Jinja code. It is rendered as `apply_chat_template` of transformers renders it, but
within limits (see `template_renderer`), since it is untrusted code. For training, the template also
marks the tokens that the model must write: those between `{% generation %}` and
`{% endgeneration %}`. In a template without these tags, they are the text that an answer adds to
its prompt.
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
# The variables of a template for special tokens are these names, with `_token` added.
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_MARKS = re.compile(f"[{BEGIN}{END}]")
_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Messages = list[dict[str, Any]]  # a conversation: [{"role": "user", "content": TEXT}, ..]
Spans = list[tuple[int, int]]  # ranges of characters: the first one, and the one after the last


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation to train on.

    Attributes:
      text: the text that the template has rendered.
      ids: the token ids of the text, int32.
      counts: for each token, True if the model must write it.
      stops: for each token, the position in the text where it ends, in characters.
      answers: for each answer, the indices of its first token that counts and of the token after
        its last one.
    """

    text: str
    ids: np.ndarray
    counts: np.ndarray
    stops: np.ndarray
    answers: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template together with its tokenizer.

    Attributes:
      source: the Jinja code.
      name: name of the template in errors.
      tokenizer: encodes the rendered text.
      tokens: `bos_token`, `eos_token` and so on, which the template may write.
    """

    source: str
    name: str
    tokenizer: Tokenizer
    tokens: Mapping[str, str]

    def render(self, messages: Messages, *, prompt: bool = True) -> str:
        """Returns the text of a conversation.

        Args:
          messages: the conversation.
          prompt: True adds the beginning of the model's next message.

        Raises:
          Refused: the template rejects these messages.
          UserError: the template is not valid Jinja, or takes more time or memory than
            `template_renderer` allows.
        """
        return _MARKS.sub("", self._render(messages, prompt))

    def _render(self, messages: Messages, prompt: bool) -> str:
        """Returns the text, with `BEGIN` and `END` around the text inside the generation tags."""
        variables = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self.tokens,
        }
        return template_renderer.shared().render(self.source, self.name, variables)

    def encode(self, messages: Messages, *, special: bool = False) -> list[int]:
        """Returns the token ids of a conversation; they contain BOS only if the template writes it.

        Special tokens that the template writes are parsed; their names in the messages stay text.

        Args:
          messages: the conversation.
          special: True parses names in the messages, too, as transformers does by default.

        Raises:
          UserError: see `render`.
        """
        guarded = messages if special else self._guarded(messages)
        return self.tokenizer.encode(self.render(guarded), special=True)

    def example(self, messages: Messages) -> Encoded:
        """Encodes a whole conversation, and marks the tokens that the model must write.

        The whole text is encoded at once; a token counts if any character of it is in an answer.

        Raises:
          Refused: the template rejects these messages.
          UserError: the template is not valid Jinja, or it has no generation tags and the text of a
            prompt is not the beginning of the text of the whole conversation.
        """
        guarded = self._guarded(messages)
        find = self._tagged if _TAG.search(self.source) else self._added
        text, answers = find(guarded)
        ids, spans = self.tokenizer.encode_spans(text)
        starts, stops = np.asarray(spans, np.int64).reshape(-1, 2).T
        # If a character has several tokens, the first of them may have an empty span.
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
        """Returns the messages, changed so that no part of them is parsed as a marker.

        This holds however the template joins them.
        """
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
        """Returns the text, and for each answer the spans inside its generation tags."""
        text, spans = self._between_tags(messages)
        number = sum(map(_said, messages))
        if number == 1:
            return text, [spans]
        if len(spans) == number:
            return text, [[span] for span in spans]
        ends = [0]  # number of spans in the messages up to each answer
        for index in filter(lambda index: _said(messages[index]), range(len(messages))):
            with contextlib.suppress(Refused):  # the template rejects a part of the conversation
                ends.append(len(self._between_tags(messages[: index + 1])[1]))
        if len(ends) <= number or ends != sorted(ends) or ends[-1] != len(spans):
            return text, [[span] for span in spans]
        return text, [spans[first:last] for first, last in itertools.pairwise(ends)]

    def _between_tags(self, messages: Messages) -> tuple[str, Spans]:
        """Returns the text, and the spans inside all generation tags."""
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
        """Returns the text, and the span that each answer and its end of turn add to the prompt."""
        text = self.render(messages, prompt=False)
        answers: list[Spans] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number])
            after = self.render(messages[: number + 1], prompt=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    f"{self.name} has no {{% generation %}}, and the text of a prompt is not the "
                    "beginning of the text with its answer, so the tokens of the answer are not "
                    "known; put {% generation %} and {% endgeneration %} around the answer"
                )
            # White space after the end of a turn separates turns, and is not part of the answer.
            kept = after.rstrip()
            ends = kept.endswith(tuple(self.tokenizer.marker_names))
            answers.append([(len(before), len(kept) if ends else len(after))])
        return text, answers

    def check(self) -> None:
        """Raises `UserError` if the template is not valid Jinja; needs no messages."""
        template_renderer.shared().check(self.source, self.name)


def named_templates(given: Any) -> dict[str, str]:
    """Reads `chat_template` of a tokenizer_config.json, and returns its templates by name.

    Args:
      given: one template, a list of templates with names, or an empty value.

    Raises:
      UserError: `given` is anything else.
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
                raise ValueError(f"{name!r} is not the name of a template")
        return found


def special_tokens(config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str]:
    """Returns `bos_token` and so on for a template, from tokenizer_config.json or the tokenizer."""
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
    """Returns whether a message is an answer of the model."""
    return message.get("role") == "assistant"


def _protected(value: Any, tokenizer: Tokenizer, answer: bool) -> Any:
    """Marks the texts in a part of a message, and the keys that contain the name of a marker."""
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
