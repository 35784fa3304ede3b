"""The exception for mistakes that the user can correct, and checks of values from users."""

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

_SMALLEST_NORMAL = 2.0**-126  # of float32; XLA treats smaller ones as 0


class UserError(ValueError):
    """A mistake in the input (config, files, flags), explained in one line.

    Commands print its message without a traceback and exit with status 1 (see `cli.command`); in a
    notebook it is an ordinary `ValueError`. Any other exception is a bug of ours and keeps its
    traceback.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its `repr` if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def one_line(text: str) -> str:
    """Joins the lines of a text by spaces."""
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
    """Returns the value if it has the type of its field; converts an int to a float.

    Args:
      name: dotted name of the field, for the message.
      value: the value to check.
      wanted: the type.

    Raises:
      UserError: the value has another type, or is infinite or not a number.
    """
    if wanted is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    require(type(value) is wanted, f"{name} must be of type {wanted.__name__}, got {value!r}")
    require(wanted is not float or math.isfinite(value), f"{name} must be finite, got {value!r}")
    return value


@dataclasses.dataclass(frozen=True)
class Check:
    """A rule for the value of a config field.

    Attributes:
      rule: completes the message "FIELD must be ..."; empty for `ANY`.
      holds: whether a value of the field's type satisfies the rule.
      bits: an integer must be less than 2**bits. Most integers are int32 on the devices.
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
    """Returns the check that a text is one of these names."""
    return Check(f"one of {', '.join(names)}", lambda value: value in names)


def field(default: _T, check: Check, meaning: str) -> _T:
    """Declares a field of a config group, which is a dataclass.

    The annotated return type is for type checkers; the object is a `dataclasses.Field`.

    Args:
      default: the default value.
      check: the rule that `check_fields` applies to the value.
      meaning: for `help()` and `--help`: what the field is, its unit, and what 0 or '' means.
    """
    return dataclasses.field(default=default, metadata={"check": check, "meaning": meaning})


def check_fields(group: str, config: Any) -> None:
    """Checks the type and the rule of each field of a config group.

    A number must also be representable on the devices: an integer must fit into the bits of its
    check, and a float must not become infinite or 0 in float32.

    Args:
      group: name of the group, for messages.
      config: the group, whose fields are declared by `field`.

    Raises:
      UserError: a value has another type or is out of range.
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
                f"{name}={value} becomes {rounded} in float32, which the devices use",
            )


def facts(one: dataclasses.Field[Any]) -> str:
    """Describes the values that a field may have, such as `int, positive; default 2_048`."""
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
    """Converts exceptions of a parser that fails on malformed content to `UserError`.

    Use it as a context around parsers of files from outside. A parser still checks what it can
    name; this catches the rest: a missing key, a wrong type, a number out of range, nesting that is
    too deep.

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
