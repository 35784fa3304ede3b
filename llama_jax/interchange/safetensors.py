"""The safetensors format, read and written in pieces.

A file is the length of a header (8 bytes, little-endian), the header (JSON: name -> dtype, shape,
place), and the arrays. The library of that name maps whole files into memory or wants all tensors
at once; here ranges of rows are read, and tensors are written in any order.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from llama_jax.errors import UserError
from llama_jax.files import refuse_pointer_file

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
      file: where it is.
      dtype: of its numbers.
      shape: its shape.
      offset: of its first byte, from the start of the file.
    """

    file: epath.Path
    dtype: Any
    shape: tuple[int, ...]
    offset: int


def read_header(file: epath.Path) -> dict[str, Entry]:
    """Name -> tensor, for all tensors of a file.

    Raises:
      UserError: the file is truncated, no safetensors file, or has another dtype.
    """
    size = file.stat().length
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= _LONGEST_HEADER:
            refuse_pointer_file(file)
            raise UserError(f"{file} is not a safetensors file")
        if 8 + length > size:
            raise UserError(f"{file} is truncated: its header alone has {length:,} bytes")
        content = stream.read(length)
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        found, end = {}, 0
        for name, value in header.items():
            if value["dtype"] not in DTYPES:
                raise UserError(
                    f"{file}: {name} has dtype {value['dtype']}; not {', '.join(DTYPES)}"
                )
            dtype, shape = DTYPES[value["dtype"]], tuple(map(int, value["shape"]))
            start, stop = value["data_offsets"]
            if stop - start != math.prod(shape) * dtype.itemsize or start < 0:
                raise UserError(f"{file}: {name} has not the bytes of its shape {shape}")
            found[name] = Entry(file, dtype, shape, 8 + length + start)
            end = max(end, 8 + length + stop)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a safetensors file: its header is damaged") from error
    if end > size:
        raise UserError(f"{file} is truncated: it has {size:,} bytes, and should have {end:,}")
    return found


def read_rows(entry: Entry, rows: slice = slice(None)) -> np.ndarray:
    """A tensor, or a range of its rows."""
    start, stop, _ = rows.indices(entry.shape[0])
    row_size = math.prod(entry.shape[1:])
    with entry.file.open("rb") as stream:
        stream.seek(entry.offset + start * row_size * entry.dtype.itemsize)
        out = np.empty((stop - start, *entry.shape[1:]), entry.dtype)
        view: Any = out.reshape(-1).view(np.uint8).data
        while len(view):
            chunk = stream.read(min(len(view), 2**26))
            if not chunk:
                raise UserError(f"{entry.file} ended while it was read")
            view[: len(chunk)] = chunk
            view = view[len(chunk) :]
    return out


class Writer:
    """Files whose layout is decided first, and whose tensors then come in any order."""

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
          folder: where they go.
          tensors: name -> shape, in the order in which they shall lie.
          dtype: of all of them.
          shard_size: bytes of a file at most, unless one tensor is larger.
          stem: of the files' names.
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
        """Writes one tensor; each must be written once."""
        stream, start, shape = self._places.pop(name)
        assert array.shape == shape and array.dtype == self._dtype, (name, array.shape, array.dtype)
        stream.seek(start)
        stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Closes the files."""
        for stream in self._streams:
            stream.close()
        assert not self._places, f"not written: {', '.join(self._places)}"
