"""Documents of Parquet files; pyarrow is imported when it is used."""

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

BATCH_ROWS = 256  # at most
# The same of a column that pyarrow keeps as a dictionary and numbers: each batch has all of it.
NUMBERED_ROWS = 1 << 14
BATCH_DOCUMENTS = 4  # times `max_document_bytes` are the bytes that rows of a batch may take
# A page may take as much, and in any case PAGE_BYTES, 32 times what most writers make. A larger one
# is read value by value; where that cannot be, it may take PACKED times its bytes in the file, more
# than text usually does.
PAGE_BYTES, PACKED = 1 << 25, 32


def parquet_parts(path: epath.Path, size: int, config: DataConfig) -> Iterator[Part]:
    """Cuts a Parquet file at row groups.

    Raises:
      UserError: it is none, or has no column of text.
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

    Left out and counted are a row group that is damaged, and the rows of a row group from a page on
    that cannot be read in little memory and would unpack to far more than its bytes in the file.
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
                if isinstance(error, OSError) and error.errno:  # the disk's, not the decoder's
                    raise
                tally.skip("damaged Parquet row group", where)
                continue
            reason = f"in a Parquet page that unpacks to more than {_largest_page(config):,} bytes"
            for _ in range(rows - good):
                tally.skip(f"{reason} and {PACKED} times its size", where)
    tally.position = part.size


def _open_parquet(raw: Any, path: str, config: DataConfig) -> tuple[Any, list[str], Any]:
    """The `ParquetFile`, and what `_text_column` says of it.

    Raises:
      UserError: it is damaged or something else, or has no column of text.
    """
    import pyarrow
    from pyarrow import parquet

    with as_user_error(path):
        try:
            # Row groups may be larger than the memory: their pages are read one after another.
            file = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=1 << 20)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's, not the decoder's
                raise
            raise UserError(f"{path} is not a Parquet file: {first_line(error)}") from error
        return file, *_text_column(file.schema_arrow, config.text_field, path)


def _largest_page(config: DataConfig) -> int:
    return max(PAGE_BYTES, BATCH_DOCUMENTS * config.max_document_bytes)


def _values(
    raw: Any, file: Any, group: int, names: list[str], kind: Any, config: DataConfig
) -> tuple[Iterator[bytes | memoryview | None], int]:
    """The values of a column of text in a row group, and how many there are before a gigantic page.

    Raises:
      ValueError: the header of a page is damaged.
    """
    from pyarrow import types

    meta, path = file.metadata.row_group(group), ".".join(names)
    numbered = types.is_dictionary(kind)
    most, largest, good = BATCH_DOCUMENTS * config.max_document_bytes, 1, meta.num_rows
    indices = [i for i in range(meta.num_columns) if meta.column(i).path_in_schema == path]
    for index in indices:  # two where a name with a dot looks like a field of a struct
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
            elif not numbered:  # each row gets its value
                largest = max(largest, dictionary)
    # Row by row up to a gigantic page, so that a batch does not need it.
    rows = max(1, min(NUMBERED_ROWS if numbered else BATCH_ROWS, most // largest))
    rows = 1 if good < meta.num_rows else rows
    return _in_batches(file, group, names, rows, good), good


def _in_batches(
    file: Any, group: int, names: list[str], rows: int, good: int
) -> Iterator[memoryview | None]:
    """The first values of a column of text, without a copy; None: no value.

    As bytes: a value that is no UTF-8 would cost all others of its batch.

    Args:
      file: the `ParquetFile`.
      group: which row group.
      names: of the column, and of the fields that lead to the text.
      rows: of a batch.
      good: rows that may be read.
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
    """The names that lead to a column of text (those of structs around it, its own), and its type.

    Raises:
      UserError: there is none, or it holds something else.
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
            + (f"; name one of {inside}" if types.is_struct(kind) else "")
        )
    return names, kind
