"""Reads and writes the safetensors format in parts.

A file consists of the length of the header (8 bytes, little-endian), the header (JSON: name ->
dtype, shape, offsets), and the arrays. The safetensors library maps whole files into memory, and
needs all tensors at once to write them. This module reads ranges of rows, and writes tensors in any
order.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from llama_jax.errors import UserError, first_line
from llama_jax.files import refuse_lfs_pointer, size_of

DTYPES: Mapping[str, Any] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {str(dtype): code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, the library's own limit


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
      file: the file that holds the tensor.
      dtype: dtype of the tensor.
      shape: shape of the tensor.
      offset: position of its first byte, from the start of the file.
    """

    file: epath.Path
    dtype: Any
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, rows: slice = slice(None)) -> np.ndarray:
        """Reads the tensor, or only a range of its rows."""
        return read_rows(self, rows)


def shown(name: str) -> str:
    """Formats a name from a foreign file for an error of one line."""
    return name if name.isprintable() and len(name) < 200 else f"{name[:200]!r}"


def read_header(file: epath.Path) -> dict[str, Entry]:
    """Opens all tensors of a file, by name; does not read their numbers.

    Refuses what the library refuses, and three things that the library accepts: a duplicate name
    (which the format forbids; the library takes the last), a space before the header, and unknown
    fields of a tensor, because they may change its numbers.

    Raises:
      UserError: the file cannot be read, is truncated, is not a safetensors file, breaks a rule of
        the format, or has another dtype.
    """
    try:
        size = size_of(file)
        with file.open("rb") as stream:
            head = stream.read(64)
            length = int.from_bytes(head[:8], "little")
            refuse_lfs_pointer(head, str(file))
            if size < 8 or not 2 <= length <= _LONGEST_HEADER:
                raise UserError(f"{file} is not a safetensors file")
            if 8 + length > size:
                raise UserError(f"{file} is truncated: its header alone has {length:,} bytes")
            stream.seek(8)
            content = stream.read(length)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    header = _parse_header(content, file)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_texts(metadata):
        raise UserError(f"{file} is damaged: its __metadata__ must map names to strings")
    found = {name: _entry(file, name, value, 8 + length) for name, value in header.items()}
    _check_layout(file, found, 8 + length, size)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"it has {shown(counts.most_common(1)[0][0])} twice")
    return values


def _size(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"{digits:.30} is not a size")
    return int(digits)


def _no_constant(name: str) -> float:
    raise ValueError(f"JSON has no {name}")


def _parse_header(content: bytes, file: epath.Path) -> dict[str, Any]:
    try:
        text = content.decode()
        if not text.startswith("{"):
            raise ValueError("it does not begin with {")
        header = json.loads(
            text, object_pairs_hook=_unique, parse_int=_size, parse_constant=_no_constant
        )
        json.dumps(header, ensure_ascii=False).encode()  # raises for halves of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file} is not a safetensors file: its header is damaged ({first_line(error)})"
        ) from error
    return header


def _is_texts(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(text, str) for text in values.values())


def _entry(file: epath.Path, name: str, value: Any, begin: int) -> Entry:
    """Returns a tensor of the header; the arrays start at the offset `begin` of the file.

    Raises:
      UserError: the header does not describe the tensor correctly.
    """
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(value, dict) or set(value) != set(fields):
        raise UserError(f"{file} is damaged: {shown(name)} must have just {', '.join(fields)}")
    code, shape, offsets = (value[field] for field in fields)
    if not isinstance(code, str) or code not in DTYPES:
        raise UserError(
            f"{file}: {shown(name)} has dtype {shown(str(code))}; supported: {', '.join(DTYPES)}"
        )
    if not (_is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2):
        raise UserError(f"{file} is damaged: shape or data_offsets of {shown(name)} are not sizes")
    dtype, (start, stop) = DTYPES[code], offsets
    # The product without zeros must be a valid size, too: otherwise NumPy cannot make the array.
    largest = math.prod(size or 1 for size in shape) * dtype.itemsize
    if stop - start != math.prod(shape) * dtype.itemsize or largest >= 2**63:
        raise UserError(f"{file}: the bytes of {shown(name)} do not fit its shape {tuple(shape)}")
    return Entry(file, dtype, tuple(shape), begin + start)


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _check_layout(file: epath.Path, found: dict[str, Entry], begin: int, size: int) -> None:
    """Checks that tensors fill the file without gaps, from the end of the header to its end."""
    end = begin
    for name, entry in sorted(found.items(), key=lambda item: (item[1].offset, item[1].size)):
        if entry.offset != end:
            what = "overlaps another tensor" if entry.offset < end else "has a gap before it"
            raise UserError(f"{file} is damaged: {shown(name)} {what}")
        end = entry.offset + entry.size
    if end > size:
        raise UserError(f"{file} is truncated: it has {size:,} bytes, and should have {end:,}")
    if end < size:
        raise UserError(f"{file} is damaged: it has {size:,} bytes, and should have {end:,}")


def read_rows(entry: Entry, rows: slice = slice(None)) -> np.ndarray:
    """Reads a tensor, or only a range of its rows."""
    shape = entry.shape or (1,)
    start, stop, _ = rows.indices(shape[0])
    row_size = math.prod(shape[1:])
    out = np.empty((stop - start, *shape[1:]), entry.dtype)
    view: Any = out.reshape(-1).view(np.uint8).data
    try:
        with entry.file.open("rb") as stream:
            stream.seek(entry.offset + start * row_size * entry.dtype.itemsize)
            while len(view):
                chunk = stream.read(min(len(view), 2**26))
                if not chunk:
                    raise UserError(f"{entry.file} ended while it was read")
                view[: len(chunk)] = chunk
                view = view[len(chunk) :]
    except OSError as error:
        raise UserError(f"cannot read {entry.file}: {error.strerror or error}") from error
    return out if entry.shape else out[0]


class Writer:
    """Writes files whose layout is fixed at the start; tensors may then come in any order."""

    def __init__(
        self,
        folder: epath.Path,
        tensors: Mapping[str, tuple[int, ...]],
        dtype: Any,
        shard_size: int,
        stem: str = "model",
    ) -> None:
        """Starts the files of a model.

        Args:
          folder: folder of the files.
          tensors: name -> shape, in the order of the tensors in the files.
          dtype: dtype of all tensors.
          shard_size: maximum bytes of a file, unless one tensor is larger.
          stem: first part of the files' names.
        """
        dtype = np.dtype(dtype)
        self._dtype = dtype
        shards: list[list[str]] = [[]]
        sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in tensors.items()}
        filled = 0
        for name, size in sizes.items():
            if shards[-1] and filled + size > shard_size:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        self._places: dict[str, tuple[Any, int, tuple[int, ...]]] = {}
        self._streams = []
        index = {}
        for number, names in enumerate(shards):
            file = f"{stem}.safetensors"
            if len(shards) > 1:
                file = f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            stream = (folder / file).open("wb")
            self._streams.append(stream)
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            offset = 0
            for name in names:
                place = [offset, offset + sizes[name]]
                shape = list(tensors[name])
                header[name] = {"dtype": _CODES[str(dtype)], "shape": shape, "data_offsets": place}
                offset += sizes[name]
                index[name] = file
            content = json.dumps(header, separators=(",", ":")).encode()
            content += b" " * (-len(content) % 8)
            stream.write(len(content).to_bytes(8, "little") + content)
            for name in names:
                start = 8 + len(content) + header[name]["data_offsets"][0]
                self._places[name] = (stream, start, tensors[name])
        if len(shards) > 1:
            total = {"total_size": sum(sizes.values())}
            text = json.dumps({"metadata": total, "weight_map": index}, indent=2)
            (folder / f"{stem}.safetensors.index.json").write_text(text + "\n")

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one tensor; each tensor must be written exactly once."""
        stream, start, shape = self._places.pop(name)
        assert array.shape == shape and array.dtype == self._dtype, (name, array.shape, array.dtype)
        stream.seek(start)
        stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Closes the files."""
        for stream in self._streams:
            stream.close()
        assert not self._places, f"not written: {', '.join(self._places)}"
