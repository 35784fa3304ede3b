"""The exception that means "the user can mend this", and checks of values that users write."""

import contextlib
import dataclasses
import inspect
import math
import re
import struct
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

_T = TypeVar("_T")
_C = TypeVar("_C")

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


def as_float32(value: float) -> float:
    """Rounds to float32 as devices do: infinite beyond the largest number, 0 where subnormal."""
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded if abs(rounded) >= _SMALLEST_NORMAL else 0.0


def check_type(name: str, value: Any, wanted: Any) -> Any:
    """Returns the value if it has the type of its field; an int may stand for a float.

    Raises:
      UserError: it has another type, or is infinite or not a number.
    """
    if wanted is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    require(type(value) is wanted, f"{name} must be of type {wanted.__name__}, got {value!r}")
    require(wanted is not float or math.isfinite(value), f"{name} must be finite, got {value!r}")
    return value


@dataclasses.dataclass(frozen=True)
class Check:
    """A rule that the value of a config field must keep.

    Attributes:
      rule: completes the message "FIELD must be ..."; empty for `ANY`.
      holds: whether a value of the field's type keeps it.
      bits: of the largest integer. Most integers are int32 on the devices.
    """

    rule: str
    holds: Callable[[Any], bool]
    bits: int = 31


ANY = Check("", lambda value: True)
NOT_EMPTY = Check("non-empty", bool)
POSITIVE = Check("positive", lambda value: value > 0)
POSITIVE_INT64 = dataclasses.replace(POSITIVE, bits=63)
NOT_NEGATIVE = Check("0 or more", lambda value: value >= 0)


def one_of(*names: str) -> Check:
    """Makes the check that a text is one of these names."""
    return Check(f"one of {', '.join(names)}", lambda value: value in names)


def field(default: _T, check: Check, meaning: str) -> _T:
    """Declares a field of a config group, which is a dataclass.

    The return type is what a type checker sees in a class; in fact it is a `dataclasses.Field`.

    Args:
      default: of the field.
      check: what `check_fields` requires of a value.
      meaning: for `help()` and `--help`: what the field is, its unit, and what 0 or '' means.
    """
    return dataclasses.field(default=default, metadata={"check": check, "meaning": meaning})


def check_fields(group: str, config: Any) -> None:
    """Checks each field of a config group by its type and its `Check`.

    A number must also be one on the devices: an integer must fit into the bits of its check, and a
    float must be neither infinite in float32 nor rounded to 0.

    Args:
      group: name of the group, for messages.
      config: the group, whose fields are declared by `field`.

    Raises:
      UserError: a value is of another type or out of range.
    """
    for one in dataclasses.fields(config):
        name, value = f"{group}.{one.name}", getattr(config, one.name)
        check: Check = one.metadata["check"]
        check_type(name, value, one.type)
        if one.type is int:
            limit = check.bits
            require(abs(value) < 2**limit, f"{name} must be less than 2**{limit}, got {value}")
        require(check.holds(value), f"{name} must be {check.rule}, got {value!r}")
        if one.type is float:
            rounded = as_float32(value)
            require(
                math.isfinite(rounded) and bool(rounded) == bool(value),
                f"{name}={value} is {rounded} in float32, in which it is used",
            )


def facts(one: dataclasses.Field[Any]) -> str:
    """Describes what a value of a field may be, such as `int, positive; default 2_048`."""
    default = f"{one.default:_}" if type(one.default) is int else repr(one.default)
    rule = one.metadata["check"].rule
    kind = cast(type, one.type).__name__
    return f"{kind}{', ' if rule else ''}{rule}; default {default}"


def with_attributes(group: type[_C]) -> type[_C]:
    """Adds the section `Attributes:` to the docstring of a dataclass, for `help()`."""
    wrapper = textwrap.TextWrapper(96, initial_indent="  ", subsequent_indent="    ")
    wrapper.break_on_hyphens = wrapper.break_long_words = False
    lines = [inspect.cleandoc(group.__doc__ or ""), "", "Attributes:"]
    for one in dataclasses.fields(cast(Any, group)):
        kind = cast(type, one.type)
        if "meaning" in one.metadata:
            text = f"{one.name} ({facts(one)}): {one.metadata['meaning']}"
        else:  # a group of fields
            text = f"{one.name} ({kind.__name__}): {(kind.__doc__ or '').partition(chr(10))[0]}"
        lines += wrapper.wrap(text)
    group.__doc__ = "\n".join(lines)
    return group


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
