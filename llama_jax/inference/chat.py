"""Conversations with a checkpoint: its chat template, and what `generate --chat` does.

A template comes as `chat_template.jinja`, others by name in `additional_chat_templates/`, or all of
them in `tokenizer_config.json`; `data/chat_template.py` renders it, `data/templates.py` has
built-in ones.

The whole conversation is the prompt of each answer; what no longer fits into the model's context is
forgotten from the oldest exchange on, which is said.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping

from etils import epath

from llama_jax.errors import UserError
from llama_jax.files import read_bytes, text_of
from llama_jax.inference.decode import Sampling
from llama_jax.inference.generation import new_texts
from llama_jax.inference.loaded_model import InferenceModel
from llama_jax.text.chat_template import (
    DEFAULT,
    ChatTemplate,
    Messages,
    named_templates,
    special_tokens,
)
from llama_jax.text.templates import BUILT_IN, built_in, end_ids
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_config import json_tokenizer, tokenizer_config
from llama_jax.text.tokenizer_files import MORE_TEMPLATES

HELP = """\
/new          forget all that was said
/system TEXT  tell the model what to be, and start anew
/help         these lines
/exit         end, as Ctrl-D does; Ctrl-C breaks off an answer"""


def templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """Templates by name, `default` among them where there is one.

    Raises:
      UserError: tokenizer_config.json is damaged.
    """
    found = named_templates(tokenizer_config(files).get("chat_template"))
    for file, content in files.items():
        folder, _, name = file.rpartition("/")
        if file == "chat_template.jinja":
            found[DEFAULT] = text_of(content, file)
        elif folder == MORE_TEMPLATES:
            found[name.removesuffix(".jinja")] = text_of(content, file)
    return found


def open_template(model: InferenceModel, choice: str = DEFAULT) -> ChatTemplate:
    """A template of a checkpoint, one of a file, or a built-in one.

    Args:
      model: with the files that came with it.
      choice: name of a template of the checkpoint or, failing that, of a built-in one; or a file
        that ends in `.jinja`.

    Raises:
      UserError: there is no such template.
    """
    tokenizer = _tokenizer(model)
    tokens = special_tokens(tokenizer_config(model.files), tokenizer)
    if choice.endswith(".jinja"):
        name = f"the chat template {choice}"
        source = text_of(read_bytes(epath.Path(choice)), name)
    else:
        name = f"the chat template {choice!r} of {model.folder}"
        found = templates(model.files)
        if choice not in found and choice in BUILT_IN:
            return built_in(choice, tokenizer)
        if choice not in found:
            which = f" {choice!r}" if found else ""
            raise UserError(
                f"{model.folder} has no chat template{which}; --chat_template may be "
                f"{', '.join([*sorted(found), *BUILT_IN])}, or a FILE.jinja"
            )
        source = found[choice]
    return ChatTemplate(source, name, tokenizer, tokens)


def _tokenizer(model: InferenceModel) -> Tokenizer:
    """The tokenizer.json where there is one beside a SentencePiece model.

    It has the tokens that were added for turns, and puts spaces where transformers puts them.
    """
    if model.tokenizer.is_json or "tokenizer.json" not in model.files:
        return model.tokenizer
    return json_tokenizer(model.files, str(model.folder))


def with_turn_ends(model: InferenceModel, template: ChatTemplate) -> InferenceModel:
    """The model, for which a token that ends a turn of the template ends an answer, too."""
    return dataclasses.replace(model, turn_ends=tuple(end_ids(template)[1:]))


class Conversation:
    """Messages so far, and the model that answers them.

    Attributes:
      messages: of the system, the user and the assistant, as they were said.
      cut: why the last answer stopped before the model ended it; empty: it did end it.
    """

    def __init__(
        self,
        model: InferenceModel,
        template: ChatTemplate,
        sampling: Sampling,
        *,
        system: str = "",
        special: bool = False,
    ) -> None:
        """Begins one; arguments as `ChatTemplate.encode` and `generation.new_texts`."""
        self._model, self._template, self._sampling = (
            with_turn_ends(model, template),
            template,
            sampling,
        )
        self._special = special
        self._answers = 0
        self.cut = ""
        self.restart(system)

    def restart(self, system: str) -> None:
        """Forgets all but `system`, the message that says what to be; empty: none."""
        self.system = system
        self.messages: Messages = [{"role": "system", "content": system}] if system else []

    def _fit(self, messages: Messages) -> tuple[Messages, list[int]]:
        """The newest of the messages that leave room for an answer, and their tokens.

        Raises:
          UserError: even the last one leaves none, or the template does not take them.
        """
        context = self._model.context
        room = min(self._sampling.max_tokens, context // 2)
        first = len(messages) - len([m for m in messages if m["role"] != "system"])
        while True:
            ids = self._template.encode(messages, special=self._special)
            last = len(messages) == first + 1
            if len(ids) + (1 if last else room) <= context:
                return messages, ids
            if last:
                raise UserError(
                    f"the message has {len(ids)} tokens with its template, but the model's context "
                    f"is {context}; shorten it"
                )
            # A user and the answer to them, so that the roles go on taking turns.
            messages = messages[:first] + messages[first + 2 :]

    def answer(self, text: str, tell: Callable[[str], None]) -> Generator[str]:
        """Answers a message, piece by piece; what was yielded is remembered as the answer.

        Args:
          text: what the user says.
          tell: gets a line on what was forgotten for it.

        Raises:
          UserError: as `_fit`; the conversation is then as it was before.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        kept, ids = self._fit(asked)
        if len(kept) < len(asked):
            tell(f"(the oldest {len(asked) - len(kept)} messages no longer fit, and are forgotten)")
        seed = self._sampling.seed + self._answers  # the same question, another answer
        sampling = dataclasses.replace(self._sampling, seed=seed)
        self._answers += 1
        parts: list[str] = []
        tokens, self.cut = 0, ""
        try:
            for piece in new_texts(self._model, [ids], sampling, chunk=1):
                parts.append(piece.text)
                tokens += piece.tokens
                if piece.ended and not piece.tokens:  # no token ended it
                    full = tokens < sampling.max_tokens
                    self.cut = "the context is full" if full else f"--max_tokens={tokens}"
                yield piece.text
        finally:
            self.messages = [*kept, {"role": "assistant", "content": "".join(parts)}]


def _lines() -> Iterator[str]:
    """What the user types, with a prompt and a history in a terminal."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "\n> "
        with contextlib.suppress(ImportError):  # not on every system
            import readline  # noqa: F401
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return


def converse(conversation: Conversation, lines: Iterable[str] | None = None) -> None:
    """Answers line after line, until there is none or one is /exit.

    Args:
      conversation: that goes on.
      lines: what the user says; None: from standard input.
    """
    if lines is None:
        lines = _lines()
        if sys.stdin.isatty():
            print(HELP)
    for line in lines:
        command, _, rest = line.strip().partition(" ")
        if command == "/exit":
            return
        if command == "/help":
            print(HELP)
        elif command == "/new":
            conversation.restart(conversation.system)
        elif command == "/system":
            conversation.restart(rest.strip())
        elif line.strip():
            _answer(conversation, line)


def _answer(conversation: Conversation, line: str) -> None:
    try:
        with contextlib.closing(conversation.answer(line, print)) as answer:
            for text in answer:
                print(text, end="", flush=True)
        if conversation.cut:
            print(f" (cut: {conversation.cut})", end="")
    except UserError as error:  # the next message may do better
        print(f"error: {error}", file=sys.stderr, flush=True)
        return
    except KeyboardInterrupt:
        print(" (broken off)", end="")
    print(flush=True)
