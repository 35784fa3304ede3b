"""The values of a Parquet text column, one at a time, where pyarrow would take too much memory.

pyarrow unpacks each page as a whole. Some writers put a whole row group into one page, and a
gigabyte of equal texts packs into a few kilobytes. This module reads the simplest form of a column,
which such pages often have: no dictionary, no lists, and a compression that can be unpacked piece
by piece (https://github.com/apache/parquet-format, `Encodings.md`).
"""

import io
import itertools
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from llama_jax.data.sources.parquet_pages import Page, pages

_CODECS = {"UNCOMPRESSED": "", "ZSTD": "zstd", "GZIP": "gzip", "BROTLI": "brotli"}
_DAMAGED = "the values of a page are damaged"


def can_stream(column: Any, schema: Any, found: list[Page]) -> bool:
    """Returns whether `values` can read a column in one row group.

    Args:
      column: the `ColumnChunkMetaData` of the column.
      schema: the `ColumnSchema` of the column.
      found: the pages of the column.
    """
    simple = schema.physical_type == "BYTE_ARRAY" and schema.max_repetition_level == 0
    return simple and column.compression in _CODECS and all(page.is_plain for page in found)


def values(file: IO[bytes], column: Any, levels: int, most: int) -> Iterator[bytes | None]:
    """Streams the values of a column in one row group; None stands for a null.

    Args:
      file: the Parquet file.
      column: the `ColumnChunkMetaData` of the column.
      levels: the definition level of a value that is not null.
      most: maximum number of bytes of a value; a longer value is replaced by `most + 1` zero bytes.

    Raises:
      ValueError: a page is damaged.
      OSError: the file cannot be read, or a page cannot be unpacked.
    """
    too_long = bytes(most + 1)
    for page in pages(file, column):
        stream, defined = _body(file, page, column.compression, levels)
        for level in defined:
            if level < levels:
                yield None
                continue
            length = int.from_bytes(_exactly(stream, 4), "little")
            if length <= most:
                yield _exactly(stream, length)
                continue
            for start in range(0, length, 1 << 16):
                _exactly(stream, min(1 << 16, length - start))
            yield too_long


def _body(
    file: IO[bytes], page: Page, compression: str, levels: int
) -> tuple[io.BufferedReader, Iterator[int]]:
    """Returns a stream of the bytes of a page's values, and the definition level of each value."""
    from pyarrow import CompressedInputStream, PythonFile

    section: Any = _Section(file, page.start, page.packed)
    # In pages of version 2, the levels come before the compressed values.
    if page.levels_bytes is not None:
        data = _exactly(section, page.levels_bytes)
    if (codec := _CODECS[compression]) and page.is_compressed:
        section = CompressedInputStream(PythonFile(section, "r"), codec)
    stream = io.BufferedReader(section, 1 << 16)
    if page.levels_bytes is None:
        length = int.from_bytes(_exactly(stream, 4), "little") if levels else 0
        if length > 2 * page.values + 64:  # a level has at most 8 bits
            raise ValueError(_DAMAGED)
        data = _exactly(stream, length)
    if not levels:
        return stream, itertools.repeat(0, page.values)
    return stream, _exactly_many(_hybrid(data, levels.bit_length()), page.values)


class _Section(io.RawIOBase):
    """A stream of a range of bytes of a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._at, self._stop = file, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._at)
        data = self._file.read(min(len(buffer), self._stop - self._at))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _exactly(stream: Any, size: int) -> bytes:
    data: bytes = stream.read(size)
    if len(data) != size:
        raise ValueError(_DAMAGED)
    return data


def _exactly_many(levels: Iterator[int], count: int) -> Iterator[int]:
    for _ in range(count):
        level = next(levels, None)
        if level is None:
            raise ValueError(_DAMAGED)
        yield level


def _hybrid(data: bytes, width: int) -> Iterator[int]:
    """Yields integers of `width` bits from Parquet's hybrid of run-length and bit packing."""
    at = 0
    while at < len(data):
        header, shift = 0, 0
        while True:
            byte = data[at : at + 1]
            if not byte or shift > 63:
                raise ValueError(_DAMAGED)
            at, header, shift = at + 1, header | (byte[0] & 127) << shift, shift + 7
            if byte[0] < 128:
                break
        if header & 1:
            size = (header >> 1) * width
            packed = np.frombuffer(data[at : at + size], np.uint8)
            bits = np.unpackbits(packed, bitorder="little").reshape(-1, width)
            yield from (bits << np.arange(width)).sum(axis=1).tolist()
        else:
            size = -(-width // 8)
            yield from itertools.repeat(int.from_bytes(data[at : at + size], "little"), header >> 1)
        at += size
