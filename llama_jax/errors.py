"""The one exception that means "the user can mend this", and how it is raised."""

from typing import Any


class UserError(ValueError):
    """A mistake in the input (config, files, flags), told in one line.

    Commands print its message without a traceback and exit with status 1 (see `cli.py`); in a
    notebook it is an ordinary `ValueError`. Anything else that escapes is a bug of ours and keeps
    its traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type, if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_positive(group: str, config: Any, *names: str) -> None:
    """Requires that the fields `names` of a config group are greater than 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{group}.{name} must be positive, got {value}")
