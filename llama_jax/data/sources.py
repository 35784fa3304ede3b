"""Where documents come from: Python's own library, text files and JSON lines, plain or gzipped."""

import collections
import dataclasses
import gzip
import json
import sysconfig
import zlib
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from llama_jax.config import DataConfig
from llama_jax.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
# Not what Python is written like: tests of odd syntax, generated tables, other people's packages.
STDLIB_EXCLUDED = (
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
    *("lib2to3", "encodings", "pydoc_data"),
)

Skipped = collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
      text: its text, never empty.
      name: the file it came from, with the line of a JSON-lines file.
    """

    text: str
    name: str


def documents(config: DataConfig, skipped: Skipped) -> Iterator[Document]:
    """Streams the documents of `config.source` in a fixed order.

    Args:
      config: what to read.
      skipped: counts, by reason, the documents that cannot be used.

    Raises:
      UserError: a path does not exist, or a glob matches nothing.
    """
    for path in list_files(config.source):
        suffixes = [suffix.lower() for suffix in path.suffixes]
        zipped = suffixes[-1:] == [".gz"]
        is_json = any(suffix in JSON_LINES for suffix in suffixes[-2:])
        try:
            with path.open("rb") as raw:
                file: Any = gzip.GzipFile(fileobj=raw) if zipped else raw
                if is_json:
                    yield from _json_lines(file, path, config, skipped)
                else:
                    yield from _whole_file(file, path, config, skipped)
        except (gzip.BadGzipFile, zlib.error, EOFError):
            skipped["damaged gzip"] += 1
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error


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
        if any(letter in path.name for letter in "*?["):
            matches = [match for match in path.parent.glob(path.name) if match.is_file()]
            if not matches:
                raise UserError(f"data.source: {pattern} matches no file")
        elif path.is_dir():
            matches = list(_walk(path))
            if not matches:
                raise UserError(f"data.source: the folder {pattern} holds no file")
        elif path.exists():
            matches = [path]
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


def _whole_file(
    file: IO[bytes], path: epath.Path, config: DataConfig, skipped: Skipped
) -> Iterator[Document]:
    data = file.read(config.max_document_bytes + 1)
    yield from _document(data, str(path), config, skipped)


def _json_lines(
    file: IO[bytes], path: epath.Path, config: DataConfig, skipped: Skipped
) -> Iterator[Document]:
    # The text of a line is at most as long as the line; escapes (\u00e9) make the line longer.
    limit = 6 * config.max_document_bytes + 1024
    number = 0
    while line := file.readline(limit):
        number += 1
        if len(line) == limit and not line.endswith(b"\n"):
            skipped[_too_long(config)] += 1
            while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                pass
            continue
        if not line.strip():
            continue
        yield from _json_document(line, f"{path}:{number}", config, skipped)


def _json_document(
    line: bytes, name: str, config: DataConfig, skipped: Skipped
) -> Iterator[Document]:
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError:
        skipped["invalid UTF-8"] += 1
        return
    except (json.JSONDecodeError, RecursionError):
        skipped["broken JSON line"] += 1
        return
    text = record.get(config.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        skipped[f"no text in field {config.text_field!r}"] += 1
        return
    # JSON may hold half of a surrogate pair, which is no Unicode text.
    yield from _document(text.encode("utf-8", "surrogatepass"), name, config, skipped)


def _too_long(config: DataConfig) -> str:
    return f"longer than {config.max_document_bytes:,} bytes"


def _document(data: bytes, name: str, config: DataConfig, skipped: Skipped) -> Iterator[Document]:
    if len(data) > config.max_document_bytes:
        skipped[_too_long(config)] += 1
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        skipped["invalid UTF-8"] += 1
        return
    if not text.strip():
        skipped["empty"] += 1
        return
    yield Document(text=text, name=name)
