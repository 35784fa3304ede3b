"""Reads typed fields of JSON files that describe a model; errors name the file and the field."""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from llama_jax.errors import UserError, check_type

_LARGEST = 2**31  # sizes and ids are int32 on the devices
_OUR_FIELD = re.compile(r"model\.(\w+)|\b(rope_\w+)")


class Fields:
    """A JSON object whose fields are read one by one."""

    def __init__(self, values: Any, name: str, inside: str = "") -> None:
        """Wraps an object.

        Args:
          values: the parsed object.
          name: the file, for errors.
          inside: the field that holds the object; empty: the object is the whole file.

        Raises:
          UserError: `values` is not an object.
        """
        if not isinstance(values, dict):
            raise UserError(f"{name}: {inside} must be an object, got {short(values)}")
        self.values: dict[str, Any] = values
        self.file, self._inside = name, inside

    def name(self, field: str) -> str:
        """Returns the name of a field with its file, for errors."""
        return f"{self.file}: {self._inside}.{field}" if self._inside else f"{self.file}: {field}"

    def given(self, field: str) -> bool:
        """Returns whether the field exists and is not null."""
        return self.values.get(field) is not None

    def get(self, field: str, kind: Any, default: Any = None) -> Any:
        """Returns the value of a field; an int is accepted as a float.

        Args:
          field: name of the field.
          kind: type of the value.
          default: value if the field is absent; None: the field is required.

        Raises:
          UserError: the field is absent and has no default, or it is null or of another type.
        """
        if field not in self.values:
            if default is None:
                missing = f"{self._inside}.{field}" if self._inside else field
                raise UserError(f"{self.file} does not have {missing!r}")
            return default
        value = self.values[field]
        whole = kind is float and type(value) is int and abs(value) < 2**63
        if type(value) is not kind and not whole:
            wanted = kind.__name__
            raise UserError(f"{self.name(field)} must be of type {wanted}, got {short(value)}")
        return check_type(self.name(field), value, kind)

    def size(self, field: str, default: int | None = None) -> int:
        """Returns a positive integer below 2**31; raises the errors of `get`."""
        value = self.get(field, int, default)
        if not 0 < value < _LARGEST:
            raise UserError(
                f"{self.name(field)} must be positive and less than 2**31, got {short(value)}"
            )
        return value

    def positive(self, field: str, default: float | None = None) -> float:
        """Returns a positive number; raises the errors of `get`."""
        value = self.get(field, float, default)
        if value <= 0:
            raise UserError(f"{self.name(field)} must be positive, got {value}")
        return value

    def refuse_others(
        self, harmless: Collection[str], without: Mapping[str, tuple[Any, ...]]
    ) -> None:
        """Raises an error if another field may change what the model computes; ignores null.

        Args:
          harmless: fields that are read elsewhere, or do not matter.
          without: fields of features that our models lack, each with the values that turn it off.

        Raises:
          UserError: a field is in neither, or turns a feature on.
        """
        for field, value in self.values.items():
            if value is None or field in harmless:
                continue
            if field not in without:
                raise UserError(
                    f"{self.name(field)} is unknown and may change what the model computes; "
                    "remove the field if it does not matter"
                )
            if not any(type(value) is type(plain) and value == plain for plain in without[field]):
                raise UserError(f"{self.name(field)}={short(value)} is not supported")


def short(value: Any) -> str:
    """Formats a JSON value for an error of one line; shortens it if necessary."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


@contextlib.contextmanager
def errors_in_file_terms(name: str, names: Mapping[str, str]) -> Iterator[None]:
    """Makes errors of our config name the file and the fields of the file, inside the block.

    Args:
      name: the file.
      names: field of `ModelConfig` -> field of the file, if the names differ.
    """
    try:
        yield
    except UserError as error:
        message = _OUR_FIELD.sub(lambda m: names.get(m[1] or m[2], m[1] or m[2]), str(error))
        raise UserError(f"{name}: {message}") from error
