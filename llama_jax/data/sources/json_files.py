"""Records and documents of JSON files: lines that are objects, and lists of records."""

import io
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.sources.decompression import Damaged, open_stream
from llama_jax.data.sources.file_kind import DAMAGED, RECORD_FIELDS, describe_fields
from llama_jax.data.sources.json_values import values
from llama_jax.data.sources.nested_fields import field_of
from llama_jax.data.sources.part import Part, Tally, decode_document, longest_json, too_long
from llama_jax.errors import UserError


def read_json_lines(part: Part, config: DataConfig, tally: Tally) -> Iterator[str]:
    """Streams the documents of a part of JSON lines.

    Args:
      part: what to read.
      config: how to read it.
      tally: receives the counts of lines that cannot be used.
    """
    for line, where in _lines(part, config, tally):
        yield from _json_document(line, where, config, tally)


def read_json_list(part: Part, config: DataConfig, tally: Tally) -> Iterator[str]:
    """Streams the documents of a file that holds a JSON list, or objects without a list.

    Args:
      part: what to read; a whole file.
      config: how to read it.
      tally: receives the counts of records that cannot be used.
    """
    for record, where in _values(part, config, tally):
        text = record if isinstance(record, str) else field_of(record, config.text_field)
        yield from _text_document(text, record, where, config, tally)


def read_records(part: Part, config: DataConfig, tally: Tally) -> Iterator[tuple[Any, str]]:
    """Streams the records of a part of JSON, each with its place for the report.

    Args:
      part: what to read.
      config: how to read it.
      tally: receives the counts of records that are not JSON.

    Raises:
      UserError: a file cannot be opened.
    """
    try:
        if part.kind == "json":
            yield from _values(part, config, tally)
            return
        if part.kind == "files":  # only damaged files get here, see `documents.list_parts`
            for path in part.paths:
                tally.skip(DAMAGED, path)
            return
        for line, where in _lines(part, config, tally):
            yield from _json_record(line, where, tally)
    except OSError as error:
        raise UserError(f"cannot read {part.paths[0]}: {error.strerror or error}") from error


def _lines(part: Part, config: DataConfig, tally: Tally) -> Iterator[tuple[bytes, str]]:
    """Yields the lines that are not empty, each with its place."""
    path = epath.Path(part.paths[0])
    limit = longest_json(config)
    with path.open("rb") as raw:
        file = open_stream(raw).file
        offset = part.start
        if offset:  # a line belongs to the part in which it begins
            file.seek(offset - 1)
            offset += _rest_of_line(file, limit) - 1
        while part.stop < 0 or offset < part.stop:
            where = f"{path} at byte {offset}"
            try:
                line = file.readline(limit)
                if not line:
                    return
                offset += len(line)
                if len(line) == limit and not line.endswith(b"\n"):
                    offset += _rest_of_line(file, limit)
                    tally.skip(too_long(config), where)
                    continue
            except Damaged:
                tally.skip(DAMAGED, where)
                return
            tally.position = raw.tell() - part.start
            if line.strip():
                yield line, where


def _values(part: Part, config: DataConfig, tally: Tally) -> Iterator[tuple[Any, str]]:
    """Yields the items of the list in a file, or its objects if it has no list, with places."""
    path = epath.Path(part.paths[0])
    number = 0
    with path.open("rb") as raw:
        # Bytes that are not UTF-8 become half surrogate pairs, so that only their record is lost.
        text = io.TextIOWrapper(open_stream(raw).file, "utf-8-sig", "surrogateescape")
        try:
            records = values(text, longest_json(config), config.template and RECORD_FIELDS)
            for number, record in enumerate(records, start=1):
                tally.position = raw.tell()
                yield record, f"{path}, record {number}"
        except Damaged:
            reason = DAMAGED
        except (ValueError, RecursionError):
            reason = "broken JSON" if number or not config.template else "no JSON list"
        else:
            return
    tally.skip(f"{reason}; the rest of the file is left out", f"{path}, after record {number}")


def _rest_of_line(file: Any, limit: int) -> int:
    """Reads past the next newline, in little memory; returns the number of bytes read."""
    taken = 0
    while piece := file.readline(limit):
        taken += len(piece)
        if piece.endswith(b"\n"):
            break
    return taken


def _json_record(line: bytes, where: str, tally: Tally) -> Iterator[tuple[Any, str]]:
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError:
        tally.skip("invalid UTF-8", where)
    except (ValueError, RecursionError):  # a number of 5,000 digits also raises a ValueError
        tally.skip("broken JSON line", where)
    else:
        yield record, where


def _json_document(line: bytes, where: str, config: DataConfig, tally: Tally) -> Iterator[str]:
    for record, _ in _json_record(line, where, tally):
        text = field_of(record, config.text_field)
        yield from _text_document(text, record, where, config, tally)


def _text_document(
    text: Any, record: Any, where: str, config: DataConfig, tally: Tally
) -> Iterator[str]:
    """Yields the text of a JSON record, or counts in `tally` why it cannot be used."""
    if not isinstance(text, str):
        problem = (
            describe_fields(record) if text is None else f"it holds {type(text).__name__}, not text"
        )
        tally.skip(f"no text in field {config.text_field!r}", f"{where}: {problem}")
        return
    # JSON may contain half of a surrogate pair, which is not Unicode text.
    yield from decode_document(text.encode("utf-8", "surrogatepass"), where, config, tally)
