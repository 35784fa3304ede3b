"""Fields of files that describe a model: typed, and each error names the file and its own field."""

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
          values: the object.
          name: the file, for errors.
          inside: the field that holds the object; empty: the file itself.

        Raises:
          UserError: it is not an object.
        """
        if not isinstance(values, dict):
            raise UserError(f"{name}: {inside} must be an object, got {short(values)}")
        self.values: dict[str, Any] = values
        self.file, self._inside = name, inside

    def name(self, field: str) -> str:
        """A field with its file, as errors call it."""
        return f"{self.file}: {self._inside}.{field}" if self._inside else f"{self.file}: {field}"

    def given(self, field: str) -> bool:
        """Whether the field is there, and not null."""
        return self.values.get(field) is not None

    def get(self, field: str, kind: Any, default: Any = None) -> Any:
        """The value of a field, which has the type `kind`; an int may stand for a float.

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
        """A positive whole number of less than 2**31; errors as `get`."""
        value = self.get(field, int, default)
        if not 0 < value < _LARGEST:
            raise UserError(
                f"{self.name(field)} must be positive and less than 2**31, got {short(value)}"
            )
        return value

    def positive(self, field: str, default: float | None = None) -> float:
        """A positive number; errors as `get`."""
        value = self.get(field, float, default)
        if value <= 0:
            raise UserError(f"{self.name(field)} must be positive, got {value}")
        return value

    def refuse_others(
        self, harmless: Collection[str], without: Mapping[str, tuple[Any, ...]]
    ) -> None:
        """Refuses each field that may change what the model computes; null configures nothing.

        Args:
          harmless: fields that are read, or do not matter.
          without: fields of what our models do not have; each with the values that mean so.

        Raises:
          UserError: a field is neither, or has another value.
        """
        for field, value in self.values.items():
            if value is None or field in harmless:
                continue
            if field not in without:
                raise UserError(
                    f"{self.name(field)} is unknown, the model may compute something else with it; "
                    "remove the field if it does not matter"
                )
            if not any(type(value) is type(plain) and value == plain for plain in without[field]):
                raise UserError(f"{self.name(field)}={short(value)} is not supported")


def short(value: Any) -> str:
    """A value of JSON for one line of an error."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


@contextlib.contextmanager
def errors_in_file_terms(name: str, names: Mapping[str, str]) -> Iterator[None]:
    """Errors of our config inside name the file, and its own fields.

    Args:
      name: the file.
      names: field of `ModelConfig` -> field of the file, where this has another name.
    """
    try:
        yield
    except UserError as error:
        message = _OUR_FIELD.sub(lambda m: names.get(m[1] or m[2], m[1] or m[2]), str(error))
        raise UserError(f"{name}: {message}") from error
