"""Where documents come from: files of text, JSON lines and Parquet, TFDS, and Python's own library.

A source is cut into parts, each read by itself, so that many processes can share the work and a
part can be done again. What the parts are depends on names and sizes of the files alone.
"""

import gzip
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from typing import IO, Any

import zstandard
from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.json_list import list_items
from llama_jax.data.reading import Part, Reading, document, too_long
from llama_jax.data.tables import parquet_parts, read_parquet, read_tfds, tfds_parts
from llama_jax.errors import UserError
from llama_jax.files import size_of

JSON_LINES = (".jsonl", ".ndjson")
JSON_LIST = ".json"
PARQUET = (".parquet",)
ZIPPED = (".gz", ".zst")
DAMAGED = (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError)
# Not what Python is written like: tests of odd syntax, generated tables, other people's packages.
STDLIB_EXCLUDED = (
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
    *("lib2to3", "encodings", "pydoc_data"),
)


def named_sources(source: str) -> dict[str, str]:
    """`web=a/*.jsonl; books=b/*.txt` by name; a source without names is called ''.

    Raises:
      UserError: a name that cannot be a folder, or comes twice.
    """
    if "=" not in source:
        return {"": source}
    found: dict[str, str] = {}
    for item in source.split(";"):
        name, _, spec = (piece.strip() for piece in item.partition("="))
        if not item.strip():
            continue
        if not name.replace("_", "").replace("-", "").isalnum() or not spec:
            raise UserError(f"data.source: {item.strip()!r} is not NAME=FILES")
        if name in found:
            raise UserError(f"data.source names {name!r} twice")
        found[name] = spec
    return found


def list_parts(source: str, config: DataConfig) -> list[Part]:
    """Cuts one source into parts of about `config.part_bytes`.

    Raises:
      UserError: a path does not exist, or a glob matches nothing.
    """
    if config.template and (source == "stdlib" or source.startswith("tfds:")):
        raise UserError(f"data.source={source} has no instruction data, which data.template needs")
    if source.startswith("tfds:"):
        return tfds_parts(source.removeprefix("tfds:"), config)
    parts: list[Part] = []
    small: list[str] = []
    small_bytes = 0

    def close() -> None:
        nonlocal small_bytes
        if small:
            parts.append(Part("files", tuple(small), 0, -1, small_bytes))
            small.clear()
            small_bytes = 0

    for path in list_files(source):
        size = size_of(path)
        kind, zipped = _kind(path)
        if config.template:
            if kind not in ("json", "jsonl"):
                raise UserError(
                    f"data.source: {path} is neither .json nor .jsonl, which data.template reads"
                )
        elif kind == "json":  # a text as any other
            kind = "files"
        if kind == "files":
            small.append(str(path))
            small_bytes += size
            if small_bytes >= config.part_bytes:
                close()
            continue
        close()
        if kind == "parquet":
            parts.extend(parquet_parts(path, size, config))
        elif zipped or kind == "json" or size <= config.part_bytes:
            parts.append(Part(kind, (str(path),), 0, -1, size))
        else:
            for start in range(0, size, config.part_bytes):
                stop = min(start + config.part_bytes, size)
                parts.append(Part("jsonl", (str(path),), start, stop, stop - start))
    close()
    return parts


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
        else:
            yield from _read_files(part, config, reading)
    except OSError as error:
        raise UserError(f"cannot read {part.paths[0]}: {error.strerror or error}") from error


def read_records(part: Part, config: DataConfig, reading: Reading) -> Iterator[tuple[Any, str]]:
    """Streams the records of a part of JSON, each with where it is.

    What is no JSON is counted in `reading`.

    Raises:
      UserError: a file cannot be opened.
    """
    try:
        if part.kind == "json":
            yield from _read_json_list(part, config, reading)
            return
        for line, where in _read_json_lines(part, config, reading):
            yield from _json_record(line, where, reading)
    except OSError as error:
        raise UserError(f"cannot read {part.paths[0]}: {error.strerror or error}") from error


def documents(source: str, config: DataConfig, reading: Reading) -> Iterator[str]:
    """Streams all documents of one source, in order.

    Raises:
      UserError: as `list_parts` and `read`.
    """
    for part in list_parts(source, config):
        yield from read(part, config, reading)


def list_files(source: str) -> list[epath.Path]:
    """The files that a source names, sorted, each once.

    Raises:
      UserError: a path does not exist, or a glob matches nothing.
    """
    if source == "stdlib":
        root = epath.Path(sysconfig.get_paths()["stdlib"])
        return [path for path in _walk(root, STDLIB_EXCLUDED) if path.suffix == ".py"]
    found: set[str] = set()
    for pattern in source.split(","):
        path = epath.Path(pattern.strip()).expanduser()
        if path.is_dir():
            matches = list(_walk(path))
            if not matches:
                raise UserError(f"data.source: the folder {pattern} holds no file")
        elif path.exists():
            matches = [path]
        elif any(letter in str(path) for letter in "*?["):
            if "**" in str(path):  # epath refuses it: in a bucket it could list for hours
                raise UserError(
                    f"data.source: {pattern} has '**'; name the folder, which is read with all "
                    "that is below it"
                )
            matches = [match for match in path.parent.glob(path.name) if match.is_file()]
            if not matches:
                raise UserError(f"data.source: {pattern} matches no file")
        else:
            raise UserError(f"data.source: {pattern} does not exist")
        found.update(str(match) for match in matches)
    return [epath.Path(name) for name in sorted(found)]


def _walk(folder: epath.Path, excluded: tuple[str, ...] = ()) -> Iterator[epath.Path]:
    """Files below a folder, sorted; `epath` has no recursive glob."""
    for path in sorted(folder.iterdir(), key=str):
        if path.name in excluded:
            continue
        if path.is_dir():
            yield from _walk(path, excluded)
        else:
            yield path


def _kind(path: epath.Path) -> tuple[str, bool]:
    """What a file holds, by its name, and whether it is compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] != [] and suffixes[-1] in ZIPPED
    last = suffixes[-2:-1] if zipped else suffixes[-1:]
    if last and last[0] in JSON_LINES:
        return "jsonl", zipped
    if last and last[0] in PARQUET:
        return "parquet", zipped
    if last and last[0] == JSON_LIST:
        return "json", zipped
    return "files", zipped


def _unzip(path: epath.Path, raw: IO[bytes]) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix.lower() == ".zst":
        reader = zstandard.ZstdDecompressor().stream_reader(
            raw, read_across_frames=True, closefd=False
        )
        return io.BufferedReader(reader)
    return raw


def _read_files(part: Part, config: DataConfig, reading: Reading) -> Iterator[str]:
    for name in part.paths:
        path = epath.Path(name)
        try:
            with path.open("rb") as raw:
                data = _unzip(path, raw).read(config.max_document_bytes + 1)
                reading.position += raw.tell()
        except DAMAGED:
            reading.skip("damaged compressed file", name)
            continue
        yield from document(data, name, config, reading)


def _read_json_lines(
    part: Part, config: DataConfig, reading: Reading
) -> Iterator[tuple[bytes, str]]:
    """Lines that are not empty, and where they are."""
    path = epath.Path(part.paths[0])
    limit = _longest(config)
    with path.open("rb") as raw:
        file = _unzip(path, raw)
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
            except DAMAGED:
                reading.skip("damaged compressed file", where)
                return
            reading.position = raw.tell() - part.start
            if line.strip():
                yield line, where


def _read_json_list(part: Part, config: DataConfig, reading: Reading) -> Iterator[tuple[Any, str]]:
    path = epath.Path(part.paths[0])
    number = 0
    with path.open("rb") as raw:
        # What is no UTF-8 costs the record that it is in: half of a surrogate pair stands for it.
        text = io.TextIOWrapper(_unzip(path, raw), "utf-8-sig", "surrogateescape")
        try:
            for number, record in enumerate(list_items(text, _longest(config)), start=1):
                reading.position = raw.tell()
                yield record, f"{path}, record {number}"
        except DAMAGED:
            reason = "damaged compressed file"
        except (ValueError, RecursionError):
            reason = "broken JSON" if number else "no JSON list"
        else:
            return
    reading.skip(f"{reason}; the rest of the file is left out", f"{path}, after record {number}")


def _longest(config: DataConfig) -> int:
    """Bytes of JSON that a document may take: escapes such as \\u00e9 make it longer."""
    return 6 * config.max_document_bytes + 1024


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
        text = record.get(config.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            reading.skip(f"no text in field {config.text_field!r}", where)
            return
        # JSON may hold half of a surrogate pair, which is no Unicode text.
        yield from document(text.encode("utf-8", "surrogatepass"), where, config, reading)
