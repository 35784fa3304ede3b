"""Prompts and conversations that are read from files."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from llama_jax.errors import UserError, as_user_error
from llama_jax.text.chat_template import Messages


@dataclasses.dataclass(frozen=True)
class Request:
    """Input that the model continues: a prompt, or a conversation."""

    prompt: str = ""
    conversation: Messages | None = None

    def messages(self) -> Messages:
        """Returns the conversation; a prompt becomes a conversation of one message."""
        return self.conversation or [{"role": "user", "content": self.prompt}]

    def to_dict(self) -> dict[str, Any]:
        """Returns the request in the form of a line of a .jsonl file."""
        if self.conversation is None:
            return {"prompt": self.prompt}
        return {"messages": self.conversation}


def read_prompts(path: epath.PathLike) -> list[str]:
    """Reads the prompts of a file, one per line; skips empty lines.

    Raises:
      UserError: the file cannot be read or has no prompt, or a line of a .jsonl file is not one.
    """
    path = epath.Path(path)
    if path.suffix not in (".jsonl", ".ndjson"):
        return [line.removesuffix("\r") for _, line in _lines(path, "prompts")]
    prompts = []
    for number, line in _lines(path, "prompts"):
        value = _json(path, number, line)
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            raise UserError(f'{path}, line {number}: neither a string nor {{"prompt": TEXT}}')
        prompts.append(prompt)
    return prompts


def read_messages(path: epath.PathLike) -> list[Messages]:
    """Reads conversations of a .jsonl file: a line is a list of messages, or {"messages": [...]}.

    Raises:
      UserError: the file cannot be read or is empty, or a line is not a conversation.
    """
    path = epath.Path(path)
    found = []
    for number, line in _lines(path, "messages"):
        value = _json(path, number, line)
        messages = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise UserError(
                f'{path}, line {number}: neither a list of messages {{"role": "user", "content": '
                'TEXT}, nor {"messages": [...]}'
            )
        found.append(messages)
    return found


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _lines(path: epath.Path, flag: str) -> Iterator[tuple[int, str]]:
    """Yields number and text of each line that is not empty."""
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --{flag}={path}: {error}") from error
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"there is no prompt in {path}")
    yield from found


def _json(path: epath.Path, number: int, line: str) -> Any:
    with as_user_error(f"{path}, line {number}"):
        try:
            return json.loads(line)
        except ValueError as error:  # also for numbers that are too long
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error
