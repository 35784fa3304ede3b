"""The exception that means "the user can mend this", and checks of values that users write."""

import contextlib
import dataclasses
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

_SMALLEST_NORMAL = 2.0**-126  # of float32; XLA takes smaller ones as 0


class UserError(ValueError):
    """A mistake in the input (config, files, flags), told in one line.

    Commands print its message without a traceback and exit with status 1 (see `cli.command`); in a
    notebook it is an ordinary `ValueError`. Anything else that escapes is a bug of ours and keeps
    its traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its type, if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def one_line(text: str) -> str:
    """The text with its lines joined by spaces."""
    return re.sub(r"\s*\n\s*", " ", text.strip())


def require(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def require_positive(group: str, config: Any, *names: str) -> None:
    """Requires that the fields `names` of a config group are greater than 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{group}.{name} must be positive, got {value}")


def require_types(group: str, config: Any, *, wide: tuple[str, ...] = ()) -> None:
    """Requires that each field of a config group has its annotated type, and no huge integer.

    Args:
      group: its name, for the message.
      config: the group.
      wide: fields that may hold integers of 64 bits; the others are int32 on the devices.
    """
    for field in dataclasses.fields(config):
        name, value = f"{group}.{field.name}", getattr(config, field.name)
        check_type(name, value, field.type)
        if field.type is int:
            bits = 63 if field.name in wide else 31
            require(abs(value) < 2**bits, f"{name} must be less than 2**{bits}, got {value}")


def require_float32(group: str, config: Any) -> None:
    """Requires that each number of a config group is one in float32, in which it is used.

    Args:
      group: its name, for the message.
      config: the group, of the right types.
    """
    for field in dataclasses.fields(config):
        if field.type is float:
            value = getattr(config, field.name)
            rounded = as_float32(value)
            require(
                math.isfinite(rounded) and bool(rounded) == bool(value),
                f"{group}.{field.name}={value} is {rounded} in float32, in which it is used",
            )


def as_float32(value: float) -> float:
    """A value in float32, as devices have it: infinite beyond the largest, 0 where subnormal."""
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded if abs(rounded) >= _SMALLEST_NORMAL else 0.0


def check_type(name: str, value: Any, wanted: Any) -> Any:
    """The value, if it has the type of its field; an int may stand for a float.

    Raises:
      UserError: it has another type, or is infinite or not a number.
    """
    if wanted is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    require(type(value) is wanted, f"{name} must be of type {wanted.__name__}, got {value!r}")
    require(wanted is not float or math.isfinite(value), f"{name} must be finite, got {value!r}")
    return value


@contextlib.contextmanager
def as_user_error(name: str) -> Iterator[None]:
    """Raises `UserError` where the code inside fails on malformed content.

    A parser of files that others wrote runs inside one. The parser still checks what it can name;
    this catches the rest: a missing key, a wrong type, a number out of range, nesting that is too
    deep.

    Args:
      name: the file, for the message.
    """
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{name} does not have {error.args[0]!r}") from error
    except RecursionError as error:
        raise UserError(f"{name} is nested too deeply to be read") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{name} is malformed: {first_line(error)}") from error
    except MemoryError as error:
        raise UserError(f"{name} needs more memory than there is") from error
