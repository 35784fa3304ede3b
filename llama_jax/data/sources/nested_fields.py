"""Fields within fields: `data.text_field=meta.text` is field `text` of `meta`.

A record of JSON has its fields in itself; those of a table or a TFDS example are in its schema.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def field_of(record: Any, name: str) -> Any:
    """The value of a field; `meta.text` is field `text` of `meta`, unless there is a `meta.text`.

    Args:
      record: a mapping, such as an object of JSON; anything else has no field.
      name: of the field, or the names on the way to it, with dots between them.

    Returns:
      The value; None where there is no such field.
    """
    if not isinstance(record, Mapping):
        return None
    if name in record:
        return record[name]
    for dot in (place for place, letter in enumerate(name) if letter == "."):
        value = field_of(record.get(name[:dot]), name[dot + 1 :])
        if value is not None:
            return value
    return None


def nested_field(
    parent: Any, path: str, fields: Callable[[Any], dict[str, Any] | None]
) -> tuple[list[str], Any]:
    """Names and type of a field, `meta.text` is `text` in `meta`; a name with a dot goes first."""
    there = fields(parent) or {}
    if path in there:
        return [path], there[path]
    for name, kind in there.items():
        if path.startswith(f"{name}."):
            names, found = nested_field(kind, path[len(name) + 1 :], fields)
            if names:
                return [name, *names], found
    return [], None


def listed_fields(
    parent: Any, fields: Callable[[Any], dict[str, Any] | None], prefix: str = ""
) -> str:
    """The fields that have none of their own, as they would be named."""

    def leaves(parent: Any, prefix: str) -> Iterable[str]:
        for name, kind in (fields(parent) or {}).items():
            name = f"{prefix}.{name}" if prefix else name
            yield from leaves(kind, name) if fields(kind) is not None else [name]

    return ", ".join(leaves(parent, prefix))
