"""Fields inside other fields: `data.text_field=meta.text` is field `text` of `meta`.

A JSON record holds its fields itself; the fields of a table or a TFDS example are in a schema.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any


def field_of(record: Any, name: str) -> Any:
    """Returns the value of a field of a record, or None if the record has no such field.

    Args:
      record: a mapping, such as a JSON object; any other value has no fields.
      name: name of the field, or the names that lead to it, joined by dots. `meta.text` is field
        `text` of `meta`, unless a field is called `meta.text`.
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
    """Finds a field in a schema.

    Args:
      parent: the schema, or the type of a field that has fields of its own.
      path: `meta.text` is field `text` of `meta`, unless a field is called `meta.text`.
      fields: returns the types of the fields of a type, by name; None: the type has no fields.

    Returns:
      The names that lead to the field, and its type; `[], None` if the field does not exist.
    """
    children = fields(parent) or {}
    if path in children:
        return [path], children[path]
    for name, kind in children.items():
        if path.startswith(f"{name}."):
            names, found = nested_field(kind, path[len(name) + 1 :], fields)
            if names:
                return [name, *names], found
    return [], None


def listed_fields(
    parent: Any, fields: Callable[[Any], dict[str, Any] | None], prefix: str = ""
) -> str:
    """Lists the names of all fields without fields of their own, with a comma between them.

    Args:
      parent: the schema, or the type of a field.
      fields: as for `nested_field`.
      prefix: the names that lead to `parent`, joined by dots; empty: `parent` is the schema.
    """

    def leaves(parent: Any, prefix: str) -> Iterable[str]:
        for name, kind in (fields(parent) or {}).items():
            name = f"{prefix}.{name}" if prefix else name
            yield from leaves(kind, name) if fields(kind) is not None else [name]

    return ", ".join(leaves(parent, prefix))
