"""Conversations with a checkpoint: its chat template, and the loop of `generate --chat`.

The default template of a checkpoint is in `chat_template.jinja`, and further ones are in
`additional_chat_templates/` under their names; or all are in `tokenizer_config.json`.
`text/chat_template.py` renders a template, and `text/templates.py` has built-in templates.

The whole conversation is the prompt of each answer. When it no longer fits into the model's
context, the oldest exchanges are left out, with a message to the user.
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
/new          forget the conversation
/system TEXT  set the system message, and start a new conversation
/help         show these lines
/exit         quit, as Ctrl-D does; Ctrl-C interrupts an answer"""


def templates(files: Mapping[str, bytes]) -> dict[str, str]:
    """Returns the templates of a checkpoint by name; the default one is named `default`.

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
    """Opens a template of the checkpoint, of a file, or a built-in one.

    Args:
      model: the model, with its files.
      choice: name of a template of the checkpoint; if it has none of that name, name of a built-in
        template; or a file that ends in `.jinja`.

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
    """Returns the tokenizer of tokenizer.json, if that file comes with a SentencePiece model.

    It has the tokens that were added for turns, and it puts spaces in the same places as
    transformers.
    """
    if model.tokenizer.is_json or "tokenizer.json" not in model.files:
        return model.tokenizer
    return json_tokenizer(model.files, str(model.folder))


def with_turn_ends(model: InferenceModel, template: ChatTemplate) -> InferenceModel:
    """Returns the model, with answers that also end at the tokens that end the template's turns."""
    return dataclasses.replace(model, turn_ends=tuple(end_ids(template)[1:]))


class Conversation:
    """The messages of a conversation, and the model that answers them.

    Attributes:
      system: the system message; empty: none.
      messages: messages of the system, the user and the assistant, in order.
      cut: why the last answer stopped before the model ended it; empty if the model ended it.
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
        """Begins a conversation.

        Args:
          model: the model that answers.
          template: turns messages into a prompt.
          sampling: how to draw tokens; each answer adds 1 to the seed.
          system: the system message; empty: none.
          special: see `ChatTemplate.encode`.
        """
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
        """Forgets the messages, and starts again with a system message; empty: none."""
        self.system = system
        self.messages: Messages = [{"role": "system", "content": system}] if system else []

    def _fit(self, messages: Messages) -> tuple[Messages, list[int]]:
        """Returns the newest messages that leave room for an answer, and their tokens.

        Raises:
          UserError: the last message alone leaves no room, or the template rejects the messages.
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
            # Drops a message and its answer together, so that the roles still alternate.
            messages = messages[:first] + messages[first + 2 :]

    def answer(self, text: str, tell: Callable[[str], None]) -> Generator[str]:
        """Answers a message, and yields the answer piece by piece.

        The conversation keeps the pieces that were yielded as the answer, even if it is incomplete.

        Args:
          text: the message of the user.
          tell: called with a line for the user, if old messages no longer fit.

        Raises:
          UserError: see `_fit`; the conversation has not changed.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        kept, ids = self._fit(asked)
        if len(kept) < len(asked):
            tell(f"(the oldest {len(asked) - len(kept)} messages no longer fit, and are forgotten)")
        seed = self._sampling.seed + self._answers  # so that a repeated question gets a new answer
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
    """Yields the lines that the user types; in a terminal, with a prompt and a history."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "\n> "
        with contextlib.suppress(ImportError):  # some systems have no readline
            import readline  # noqa: F401
    while True:
        try:
            yield input(prompt)
        except (EOFError, KeyboardInterrupt):
            print()
            return


def converse(conversation: Conversation, lines: Iterable[str] | None = None) -> None:
    """Answers line after line, until the lines end or a line is /exit.

    Args:
      conversation: the conversation to continue.
      lines: messages and commands of the user; None: read from standard input.
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
    except UserError as error:  # the conversation goes on: the next message may fit
        print(f"error: {error}", file=sys.stderr, flush=True)
        return
    except KeyboardInterrupt:
        print(" (interrupted)", end="")
    print(flush=True)
