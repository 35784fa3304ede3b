"""The one exception that means "the user can mend this", and what its messages say.

At the end is what a misspelt name most likely means: "did you mean ...?".
"""

import contextlib
import dataclasses
import difflib
import math
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

_SMALLEST_NORMAL = 2.0**-126  # of float32; XLA takes smaller ones as 0
# Of `difflib`: how alike two names are. The first within a group, the second among all fields.
ALIKE, _MUCH_ALIKE = 0.6, 0.75


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


def unknown_field(
    name: str, fields: Collection[str], others: Mapping[str, str], prefix: str
) -> str:
    """The message about a dotted name that no field of a config has.

    Args:
      name: such as `optim.lr`.
      fields: dotted names of all fields.
      others: names that other programs have for a field or group, with spaces between them.
      prefix: what stands before a dotted name where the user writes it, such as `--config.`.
    """
    while name.startswith("config."):
        name = name.removeprefix("config.")
    if name in fields:
        return f"there is no {prefix}config.{name}; did you mean {prefix}{name}?"
    groups = list(dict.fromkeys(field.partition(".")[0] for field in fields if "." in field))
    group, _, field = name.partition(".")
    own = [one.partition(".")[2] for one in fields if one.startswith(f"{group}.")]
    if name.rstrip(".") in groups:
        return (
            f"{group} is a group of fields; set one of them, as {prefix}{group}.FIELD: "
            f"{', '.join(own)}"
        )
    for whole in fields:
        if name.startswith(f"{whole}."):
            return f"{whole} is a field, not a group; did you mean {prefix}{whole}?"
    if group in groups:
        begin = f"{group} has no field {field}"
        inside = [f"{group}.{one}" for one in own]
        exact = same_names(field, own)
        if not exact:
            aliased = [one for one in inside if plain(field) in other_names(others, one)]
            exact = [one.partition(".")[2] for one in aliased]
        if exact:
            return f"{begin}; did you mean {either(exact)}?"
        rest = [one for one in fields if one not in inside]
        last = field.rpartition(".")[2]
        if found := _exactly(last, rest, others):
            return f"{begin}; did you mean {either(prefix + one for one in found)}?"
        if found := alike_names(field, own, ALIKE):
            return f"{begin}; did you mean {either(found)}?"
        if found := fields_named(last, rest, others):
            return f"{begin}; did you mean {either(prefix + one for one in found)}?"
        return f"{begin}; it has {', '.join(own)}"
    similar = _groups_like(group, groups, others)
    kind = "group" if field or similar else "field"
    begin = f"the config has no {kind} {group or repr(group)}"
    found = fields_spelt(name, fields) or _in_groups(similar, field, fields, others)
    found = found or fields_named(field or name, fields, others)
    if found:
        return f"{begin}; did you mean {either(prefix + one for one in found)}?"
    if similar:
        return f"{begin}; did you mean {either(prefix + one for one in similar)}?"
    alone = [one for one in fields if "." not in one]
    return f"{begin}; its groups are {', '.join(groups)}, and {', '.join(alone)} is in none"


def _in_groups(
    groups: list[str], field: str, fields: Collection[str], others: Mapping[str, str]
) -> list[str]:
    """Fields of these groups that a misspelt one means."""
    found = []
    for name in groups:
        own = [one for one in fields if one.startswith(f"{name}.")]
        inner = {one.partition(".")[2]: one for one in own}
        matches = [inner[one] for one in same_names(field, inner)]
        matches = matches or [one for one in own if plain(field) in other_names(others, one)]
        found += matches or [inner[one] for one in alike_names(field, inner, ALIKE)]
    return found[:2] if field else []


def _groups_like(group: str, groups: list[str], others: Mapping[str, str]) -> list[str]:
    """Groups that a misspelt one means."""
    named = [name for name in groups if plain(group) in other_names(others, name)]
    return same_names(group, groups) or named or alike_names(group, groups, ALIKE)


def fields_named(name: str, fields: Collection[str], others: Mapping[str, str]) -> list[str]:
    """Fields of any group that a name without its group means."""
    if found := _exactly(name, fields, others):
        return found
    last: dict[str, str] = {}
    for field in fields:
        last.setdefault(field.rpartition(".")[2], field)
    return [last[one] for one in alike_names(name, last, _MUCH_ALIKE)]


def _exactly(name: str, fields: Collection[str], others: Mapping[str, str]) -> list[str]:
    """Fields with this very name, or that have it in other programs."""
    groups = {field.partition(".")[0] for field in fields if "." in field}
    same = [field for field in fields if plain(field.rpartition(".")[2]) == plain(name)]
    if same and name not in groups:
        # The group dcn has the fields of mesh, which is the one that is set.
        return [field for field in same if not field.startswith("dcn.")] or same
    return [field for field in fields if plain(name) in other_names(others, field)]


def fields_spelt(name: str, fields: Collection[str], prefix: str = "") -> list[str]:
    """Fields whose dotted names have the same letters, whatever signs are between them."""

    def letters(text: str) -> str:
        return re.sub("[^a-z0-9]", "", text.lower())

    return [field for field in fields if letters(name) == prefix + letters(field)]


def same_names(name: str, known: Iterable[str]) -> list[str]:
    """The known names that differ from this one in case, `_` and `-` only."""
    return [one for one in known if plain(one) == plain(name)]


def alike_names(name: str, known: Iterable[str], cutoff: float) -> list[str]:
    """The name that is most like this one, or two that are so equally."""
    names, name = list(known), name.lower().replace("-", "_")
    found = difflib.get_close_matches(name, names, 2, cutoff)
    if len(found) > 1:
        best, next_best = (difflib.SequenceMatcher(None, one, name).ratio() for one in found)
        found = sorted(found) if best == next_best else found[:1]
    if not found and len(name) > 2:  # half a name
        found = [one for one in names if one.startswith(name) or f"_{name}" in one][:2]
    return found


def other_names(table: Mapping[str, str], key: str) -> list[str]:
    """The plain names that a table has for a field, group or flag of ours."""
    return [plain(word) for word in table.get(key, "").split()]


def plain(name: str) -> str:
    """A name without what people write in different ways: case, `_` and `-`."""
    return re.sub("[-_~]", "", name.lower())


def either(names: Iterable[str]) -> str:
    """The names with `or` between them."""
    return " or ".join(names)
