"""Documents of Parquet files. pyarrow is imported only when it is used."""

import itertools
from collections.abc import Iterator
from typing import Any

from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.sources import parquet_stream
from llama_jax.data.sources.nested_fields import listed_fields, nested_field
from llama_jax.data.sources.parquet_pages import pages
from llama_jax.data.sources.parquet_stream import can_stream
from llama_jax.data.sources.part import Part, Tally, texts
from llama_jax.errors import UserError, as_user_error, first_line

BATCH_ROWS = 256  # maximum number of rows of a batch
# The maximum for a column that pyarrow keeps as a dictionary and indices. It is larger, because
# each batch contains the whole dictionary.
NUMBERED_ROWS = 1 << 14
BATCH_DOCUMENTS = 4  # the rows of a batch may take this many times `max_document_bytes`
# A page may take as many bytes as a batch, and at least PAGE_BYTES, 32 times the page size of most
# writers. A larger page is read value by value. If that is impossible, it may take at most PACKED
# times its bytes in the file; text rarely compresses as well.
PAGE_BYTES, PACKED = 1 << 25, 32


def parquet_parts(path: epath.Path, size: int, config: DataConfig) -> Iterator[Part]:
    """Cuts a Parquet file into parts at row groups.

    Args:
      path: the file.
      size: its bytes on disk, which are shared out among the parts.
      config: names the column, and sets the size of a part.

    Raises:
      UserError: the file is not a Parquet file, or has no such column of text.
    """
    with path.open("rb") as raw:
        file = _open_parquet(raw, str(path), config)[0]
        groups = [file.metadata.row_group(g).total_byte_size for g in range(file.num_row_groups)]
    start, total = 0, 0
    for group, length in enumerate(groups):
        total += length
        if total >= config.part_bytes or group == len(groups) - 1:
            share = size * (group + 1 - start) // len(groups)
            yield Part("parquet", (str(path),), start, group + 1, share)
            start, total = group + 1, 0


def read_parquet(part: Part, config: DataConfig, tally: Tally) -> Iterator[str]:
    """Streams the documents of some row groups, in memory of a few times `max_document_bytes`.

    Two things are skipped and counted: a damaged row group; and the rest of a row group, from the
    first page that cannot be read in little memory and unpacks to far more than its bytes on disk.

    Args:
      part: the row groups.
      config: names the column, and limits the length of a document.
      tally: receives the counts of rows and row groups that are skipped.

    Raises:
      UserError: the file is not a Parquet file, or has no such column of text.
      OSError: the file cannot be read.
    """
    import pyarrow

    path = part.paths[0]
    with epath.Path(path).open("rb") as raw:
        file, names, kind = _open_parquet(raw, path, config)
        for group in range(part.start, part.stop):
            where = f"{path}, row group {group}"
            rows = file.metadata.row_group(group).num_rows
            try:
                found, good = _values(raw, file, group, names, kind, config)
                yield from texts(found, where, config, tally)
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                if isinstance(error, OSError) and error.errno:  # from the disk, not the decoder
                    raise
                tally.skip("damaged Parquet row group", where)
                continue
            reason = f"in a Parquet page that unpacks to more than {_largest_page(config):,} bytes"
            for _ in range(rows - good):
                tally.skip(f"{reason} and {PACKED} times its size", where)
    tally.position = part.size


def _open_parquet(raw: Any, path: str, config: DataConfig) -> tuple[Any, list[str], Any]:
    """Opens a Parquet file; returns the `ParquetFile` and the result of `_text_column`.

    Raises:
      UserError: the file is damaged or not a Parquet file, or has no such column of text.
    """
    import pyarrow
    from pyarrow import parquet

    with as_user_error(path):
        try:
            # Row groups may be larger than the memory, so their pages are read one by one.
            file = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # from the disk, not the decoder
                raise
            raise UserError(f"{path} is not a Parquet file: {first_line(error)}") from error
        return file, *_text_column(file.schema_arrow, config.text_field, path)


def _largest_page(config: DataConfig) -> int:
    return max(PAGE_BYTES, BATCH_DOCUMENTS * config.max_document_bytes)


def _values(
    raw: Any, file: Any, group: int, names: list[str], kind: Any, config: DataConfig
) -> tuple[Iterator[bytes | memoryview | None], int]:
    """Returns the values of a text column in a row group, and how many of its rows can be read.

    The rows from a huge page on cannot be read.

    Raises:
      ValueError: the header of a page is damaged.
    """
    from pyarrow import types

    meta, path = file.metadata.row_group(group), ".".join(names)
    numbered = types.is_dictionary(kind)
    most, largest, good = BATCH_DOCUMENTS * config.max_document_bytes, 1, meta.num_rows
    indices = [i for i in range(meta.num_columns) if meta.column(i).path_in_schema == path]
    for index in indices:  # two if the name of one column looks like a path into a struct
        column, schema = meta.column(index), file.schema.column(index)
        found = list(pages(raw, column))
        large = [page.size > _largest_page(config) for page in found]
        if any(large) and len(indices) == 1 and can_stream(column, schema, found):
            levels = schema.max_definition_level
            return parquet_stream.values(raw, column, levels, config.max_document_bytes), good
        dictionary, row = 0, 0
        for page, is_large in zip(found, large, strict=True):
            if is_large and page.size > PACKED * page.packed:
                good = min(good, row)
                break
            if page.is_dictionary:
                dictionary = page.size
                continue
            row += page.values
            average = page.size // max(1, page.values)
            if not page.numbered:
                largest = max(largest, average)
            elif not numbered:  # pyarrow copies the value of the dictionary to each row
                largest = max(largest, dictionary)
    # Before a huge page, rows are read one by one, so that no batch includes rows of that page.
    rows = max(1, min(NUMBERED_ROWS if numbered else BATCH_ROWS, most // largest))
    rows = 1 if good < meta.num_rows else rows
    return _in_batches(file, group, names, rows, good), good


def _in_batches(
    file: Any, group: int, names: list[str], rows: int, good: int
) -> Iterator[memoryview | None]:
    """Yields the first values of a text column, without a copy; None stands for a null.

    The values are bytes: as strings, one value that is not UTF-8 would make its whole batch fail.

    Args:
      file: the `ParquetFile`.
      group: number of the row group.
      names: name of the column, and names of the fields that lead to the text.
      rows: rows in a batch.
      good: number of rows that may be read.
    """
    from pyarrow import compute, types

    batches = file.iter_batches(
        rows, row_groups=[group], columns=[".".join(names)], use_threads=False
    )
    for batch in itertools.islice(batches, -(-good // rows)):
        column = batch.column(batch.schema.names.index(names[0]))
        if len(names) > 1:
            column = compute.struct_field(column, names[1:])
        for scalar in column:
            if types.is_dictionary(column.type):
                scalar = scalar.value
            buffer = scalar.as_buffer() if scalar.is_valid else None
            yield memoryview(buffer) if buffer is not None else None


def _text_column(schema: Any, field: str, path: str) -> tuple[list[str], Any]:
    """Returns the names that lead to a text column (outer structs first), and its type.

    Raises:
      UserError: the column does not exist, or does not hold text.
    """
    from pyarrow import types

    def fields(kind: Any) -> dict[str, Any] | None:
        if kind is not schema and not types.is_struct(kind):
            return None
        return {kind.field(index).name: kind.field(index).type for index in range(len(kind.names))}

    names, kind = nested_field(schema, field, fields)
    if not names:
        raise UserError(f"{path} has no column {field!r}; it has {listed_fields(schema, fields)}")
    value = kind.value_type if types.is_dictionary(kind) else kind
    checks = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
    if not types.is_null(value) and not any(getattr(types, f"is_{one}")(value) for one in checks):
        inside = listed_fields(kind, fields, field)
        raise UserError(
            f"column {field!r} of {path} holds {kind}, not text"
            + (f"; name one of its fields: {inside}" if types.is_struct(kind) else "")
        )
    return names, kind
