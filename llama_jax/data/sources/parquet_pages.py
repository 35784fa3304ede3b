"""The sizes of the pages of a Parquet column, which tell how much memory it takes to read them.

pyarrow unpacks each page as a whole, and does not report its size: a file of a few hundred bytes
can contain a page of a gigabyte. The header of each page has its size, in Thrift's compact protocol
(https://github.com/apache/parquet-format, `parquet.thrift`; `thrift-compact-protocol.md`).
"""

import dataclasses
from collections.abc import Iterator
from typing import IO, Any

_HEADER_BYTES = 1 << 8, 1 << 24  # first and largest read: statistics may contain long values
_DEPTH = 8  # maximum depth of nested structs; the format has 3
_DICTIONARY, _INDEX = 2, 1  # types of pages that hold no rows
_PLAIN, _NUMBERS = 0, (2, 8)  # encodings


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of a column.

    Attributes:
      is_dictionary: whether this is the dictionary, to whose values other pages refer by index.
      numbered: whether its values are indices into the dictionary.
      is_plain: whether its values are stored in full, one after another (encoding PLAIN).
      values: number of values, nulls included.
      size: bytes of the page in memory.
      packed: bytes of the page in the file.
      start: offset of the first byte after its header.
      levels_bytes: length of the levels, which tell which values are null, if they are stored
        uncompressed before the values; None: they are compressed with the values.
      is_compressed: whether the values are compressed.
    """

    is_dictionary: bool
    numbered: bool
    is_plain: bool
    values: int
    size: int
    packed: int
    start: int
    levels_bytes: int | None
    is_compressed: bool


def pages(file: IO[bytes], column: Any) -> Iterator[Page]:
    """Streams the pages of a column in one row group; reads only their headers.

    Args:
      file: the Parquet file.
      column: its `ColumnChunkMetaData`.

    Raises:
      ValueError: a header is damaged.
      OSError: the file cannot be read.
    """
    at = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < at:
        at = column.dictionary_page_offset
    left = column.num_values
    while left > 0:
        header, length = _header(file, at)
        # Headers of a data page (5), a dictionary page (7) and a data page of version 2 (8).
        described = header.get(5) or header.get(7) or header.get(8) or {}
        kind, size, packed, values = (
            _size(one) for one in (*map(header.get, (1, 2, 3)), described.get(1, 0))
        )
        if kind != _INDEX:
            second = 8 in header  # a data page of version 2
            encoding = described.get(4 if second else 2)
            is_dictionary = kind == _DICTIONARY
            yield Page(
                is_dictionary=is_dictionary,
                numbered=not is_dictionary and encoding in _NUMBERS,
                is_plain=not is_dictionary and encoding == _PLAIN,
                values=values,
                size=size,
                packed=packed,
                start=at + length,
                levels_bytes=_size(described.get(5, 0)) if second else None,
                is_compressed=described.get(7, True) is not False,
            )
            left -= 0 if is_dictionary else values
        at += length + packed


def _size(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError("the header of a page is damaged")
    return value


def _header(file: IO[bytes], at: int) -> tuple[dict[int, Any], int]:
    """Reads the header at an offset; returns its fields by their numbers, and its length."""
    first, most = _HEADER_BYTES
    size = first
    while True:
        file.seek(at)
        data = file.read(size)
        try:
            return _Thrift(data).struct()
        except IndexError as error:  # the header is longer than `data`
            if len(data) < size or size >= most:
                raise ValueError("the header of a page is cut off") from error
            size *= 16


class _Thrift:
    """A reader of values in the compact protocol. Raises an IndexError at the end of the data."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self, depth: int = 0) -> tuple[dict[int, Any], int]:
        """Returns the fields of a struct by their numbers, and the offset of its end."""
        if depth > _DEPTH:
            raise ValueError("the header of a page is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._zigzag()
            fields[number] = self._value(kind & 15, depth)
        return fields, self._at

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # the type itself is the value: true or false
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind in (7, 8):  # a double or a string, which are skipped
            length = 8 if kind == 7 else self._varint()
            self._at += length
            if self._at > len(self._data):
                raise IndexError
            return None
        if kind in (9, 10):
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            for _ in range(count):
                self._byte() if head & 15 in (1, 2) else self._value(head & 15, depth)
            return None
        if kind == 12:
            return self.struct(depth + 1)[0]
        raise ValueError("the header of a page is damaged")

    def _byte(self) -> int:
        byte = self._data[self._at]
        self._at += 1
        return byte

    def _varint(self) -> int:
        value, shift = 0, 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("the header of a page is damaged")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
