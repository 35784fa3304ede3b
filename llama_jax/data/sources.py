"""Where documents come from: files of text, JSON lines and Parquet, TFDS, and Python's own library.

A source is cut into parts, each read by itself, so that many processes can share the work and a
part can be done again. What the parts are depends on names, sizes and first bytes of the files.
"""

import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.cutting import text_documents
from llama_jax.data.folders import THREADS
from llama_jax.data.json_list import values
from llama_jax.data.listing import list_files, named_sources
from llama_jax.data.looking import DAMAGED, RECORD_FIELDS, Look, has, look, named
from llama_jax.data.opening import Damaged, open_stream
from llama_jax.data.reading import Part, Reading, document, field_of, longest_json, too_long
from llama_jax.data.tables import parquet_parts, read_parquet, read_tfds, tfds_parts
from llama_jax.errors import UserError
from llama_jax.files import size_of

__all__ = [
    "Reading",
    "documents",
    "list_files",
    "list_parts",
    "named_sources",
    "read",
    "read_records",
]


def list_parts(
    source: str,
    config: DataConfig,
    own: Sequence[epath.PathLike] = (),
    reading: Reading | None = None,
    name: str = "",
) -> list[Part]:
    """Cuts one source into parts of about `config.part_bytes`.

    Args:
      source: what to read.
      config: how to read it.
      own: folders that this run writes, which are left out of the folder that they are in.
      reading: takes the numbers of files of each kind, and of what is left out.
      name: of the source, for errors.

    Raises:
      UserError: as `list_files`; or a file cannot be read, or is not of a kind that is read here.
    """
    if config.template and (source == "stdlib" or source.startswith("tfds:")):
        raise UserError(f"data.source={source} has no instruction data, which data.template needs")
    if source.startswith("tfds:"):
        return tfds_parts(source.removeprefix("tfds:"), config)
    reading = Reading() if reading is None else reading
    parts: list[Part] = []
    small: list[str] = []
    small_bytes = 0

    def close() -> None:
        nonlocal small_bytes
        if small:
            parts.append(Part("files", tuple(small), 0, -1, small_bytes))
            small.clear()
            small_bytes = 0

    for path, found in _looks(source, list_files(source, own, reading, name), config):
        size = found.size
        if not found.kind:
            reading.leave_out(found.label, str(path))
            continue
        if config.template and found.kind in ("files", "parquet"):
            raise UserError(
                f"data.source: {path} is neither .json nor .jsonl, which data.template reads, but "
                f"{found.label}"
            )
        if found.kind != "damaged":
            reading.files[found.label] += 1
        ranges = found.as_stored and _is_cut(found.kind, size, config)
        if found.kind in ("files", "damaged") and not ranges:
            small.append(str(path))
            small_bytes += size
            if small_bytes >= config.part_bytes:
                close()
            continue
        close()
        kind = "text" if found.kind == "files" else found.kind
        if kind == "parquet":
            parts.extend(parquet_parts(path, size, config))
        elif not ranges:
            parts.append(Part(kind, (str(path),), 0, -1, size))
        else:
            for start in range(0, size, config.part_bytes):
                stop = min(start + config.part_bytes, size)
                parts.append(Part(kind, (str(path),), start, stop, stop - start))
    close()
    return parts


def _looks(
    source: str, files: list[epath.Path], config: DataConfig
) -> Iterator[tuple[epath.Path, Look]]:
    """Each file with what it is; many are asked about at once, since buckets answer late."""
    if source == "stdlib":
        for path in files:
            yield path, Look("files", "plain text", True, size_of(path))
        return
    with ThreadPoolExecutor(min(THREADS, len(files) or 1)) as pool:
        yield from zip(files, pool.map(lambda path: look(path, config), files), strict=True)


def _is_cut(kind: str, size: int, config: DataConfig) -> bool:
    """Whether a file is read in ranges of bytes."""
    if kind == "files" and not config.separator:
        return size > config.max_document_bytes
    return kind in ("files", "jsonl") and size > config.part_bytes


def read(part: Part, config: DataConfig, reading: Reading) -> Iterator[str]:
    """Streams the documents of a part, none empty; what cannot be used is counted in `reading`.

    Raises:
      UserError: a file cannot be opened.
    """
    try:
        if part.kind == "tfds":
            yield from read_tfds(part, config, reading)
        elif part.kind == "parquet":
            yield from read_parquet(part, config, reading)
        elif part.kind == "jsonl":
            for line, where in _read_json_lines(part, config, reading):
                yield from _json_document(line, where, config, reading)
        elif part.kind == "json":
            for record, where in _read_json_values(part, config, reading):
                text = record if isinstance(record, str) else field_of(record, config.text_field)
                yield from _text_document(text, record, where, config, reading)
        else:
            yield from _read_texts(part, config, reading)
    except OSError as error:
        path = error.filename or part.paths[0]
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_records(part: Part, config: DataConfig, reading: Reading) -> Iterator[tuple[Any, str]]:
    """Streams the records of a part of JSON, each with where it is.

    What is no JSON is counted in `reading`.

    Raises:
      UserError: a file cannot be opened.
    """
    try:
        if part.kind == "json":
            yield from _read_json_values(part, config, reading)
            return
        if part.kind == "files":  # no other files get here, see `list_parts`
            for path in part.paths:
                reading.skip(DAMAGED, path)
            return
        for line, where in _read_json_lines(part, config, reading):
            yield from _json_record(line, where, reading)
    except OSError as error:
        raise UserError(f"cannot read {part.paths[0]}: {error.strerror or error}") from error


def documents(
    source: str,
    config: DataConfig,
    reading: Reading,
    own: Sequence[epath.PathLike] = (),
    name: str = "",
) -> Iterator[str]:
    """Streams all documents of one source, in order.

    Args:
      source: what to read.
      config: how to read it.
      reading: takes the counts of files and of documents.
      own: folders that this run writes, as in `list_parts`.
      name: of the source, for errors.

    Raises:
      UserError: as `list_parts` and `read`.
    """
    for part in list_parts(source, config, own, reading, name):
        yield from read(part, config, reading)


def _read_texts(part: Part, config: DataConfig, reading: Reading) -> Iterator[str]:
    """Documents of files of plain text, or of a range of one."""
    position = reading.position
    for name in part.paths:
        path = epath.Path(name)
        with path.open("rb") as raw:
            opened = open_stream(raw)
            if named(path)[1] and not opened.compression:
                reading.skip(DAMAGED, name)  # nothing else in it says what it is
                continue
            texts = text_documents(opened.file, part.start, part.stop, name, config, reading)
            try:
                for text in texts:
                    reading.position = position + raw.tell() - part.start
                    yield text
            except Damaged:
                reading.skip(DAMAGED, name)
            position += raw.tell() - part.start
            reading.position = position


def _read_json_lines(
    part: Part, config: DataConfig, reading: Reading
) -> Iterator[tuple[bytes, str]]:
    """Lines that are not empty, and where they are."""
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
                    reading.skip(too_long(config), where)
                    continue
            except Damaged:
                reading.skip(DAMAGED, where)
                return
            reading.position = raw.tell() - part.start
            if line.strip():
                yield line, where


def _read_json_values(
    part: Part, config: DataConfig, reading: Reading
) -> Iterator[tuple[Any, str]]:
    """Items of the list in a file, or the objects that it holds instead."""
    path = epath.Path(part.paths[0])
    number = 0
    with path.open("rb") as raw:
        # What is no UTF-8 costs the record that it is in: half of a surrogate pair stands for it.
        text = io.TextIOWrapper(open_stream(raw).file, "utf-8-sig", "surrogateescape")
        try:
            found = values(text, longest_json(config), config.template and RECORD_FIELDS)
            for number, record in enumerate(found, start=1):
                reading.position = raw.tell()
                yield record, f"{path}, record {number}"
        except Damaged:
            reason = DAMAGED
        except (ValueError, RecursionError):
            reason = "broken JSON" if number or not config.template else "no JSON list"
        else:
            return
    reading.skip(f"{reason}; the rest of the file is left out", f"{path}, after record {number}")


def _rest_of_line(file: Any, limit: int) -> int:
    """Reads past the next newline, in little memory; how many bytes that were."""
    taken = 0
    while piece := file.readline(limit):
        taken += len(piece)
        if piece.endswith(b"\n"):
            break
    return taken


def _json_record(line: bytes, where: str, reading: Reading) -> Iterator[tuple[Any, str]]:
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError:
        reading.skip("invalid UTF-8", where)
    except (ValueError, RecursionError):  # the former also for a number of 5,000 digits
        reading.skip("broken JSON line", where)
    else:
        yield record, where


def _json_document(line: bytes, where: str, config: DataConfig, reading: Reading) -> Iterator[str]:
    for record, _ in _json_record(line, where, reading):
        text = field_of(record, config.text_field)
        yield from _text_document(text, record, where, config, reading)


def _text_document(
    text: Any, record: Any, where: str, config: DataConfig, reading: Reading
) -> Iterator[str]:
    """The text of a record of JSON, or nothing and a count of why."""
    if not isinstance(text, str):
        found = has(record) if text is None else f"it holds {type(text).__name__}, not a text"
        reading.skip(f"no text in field {config.text_field!r}", f"{where}: {found}")
        return
    # JSON may hold half of a surrogate pair, which is no Unicode text.
    yield from document(text.encode("utf-8", "surrogatepass"), where, config, reading)
