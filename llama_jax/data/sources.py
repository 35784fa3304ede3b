"""Where documents come from: files of text, JSON lines and Parquet, TFDS, and Python's own library.

A source is cut into parts, each read by itself, so that many processes can share the work and a
part can be done again. What the parts are depends on names and sizes of the files alone.
"""

import collections
import dataclasses
import gzip
import io
import itertools
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import zstandard
from etils import epath

from llama_jax.config import DataConfig
from llama_jax.errors import UserError

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
ZIPPED = (".gz", ".zst")
DAMAGED = (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError)
# Not what Python is written like: tests of odd syntax, generated tables, other people's packages.
STDLIB_EXCLUDED = (
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
    *("lib2to3", "encodings", "pydoc_data"),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a source.

    Attributes:
      kind: `files` (whole files, one document each), `jsonl`, `parquet` or `tfds`.
      paths: the files; for TFDS the name of the dataset.
      start: first byte (jsonl), row group (parquet) or example (tfds).
      stop: where it ends; -1: at the end.
      size: bytes on disk, for progress.
    """

    kind: str
    paths: tuple[str, ...]
    start: int
    stop: int
    size: int


class Reading:
    """What one pass over a part has met.

    Attributes:
      skipped: documents that could not be used, by reason.
      first: where the first of each reason was.
      position: bytes of the part read so far, about.
    """

    def __init__(self) -> None:
        self.skipped: collections.Counter[str] = collections.Counter()
        self.first: dict[str, str] = {}
        self.position = 0

    def skip(self, reason: str, where: str) -> None:
        """Counts a document that cannot be used."""
        self.skipped[reason] += 1
        self.first.setdefault(reason, where)


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
    if source.startswith("tfds:"):
        return _tfds_parts(source.removeprefix("tfds:"), config)
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
        size = path.stat().length
        kind, zipped = _kind(path)
        if kind == "files":
            small.append(str(path))
            small_bytes += size
            if small_bytes >= config.part_bytes:
                close()
            continue
        close()
        if kind == "parquet":
            parts.extend(_parquet_parts(path, size, config))
        elif zipped or size <= config.part_bytes:
            parts.append(Part("jsonl", (str(path),), 0, -1, size))
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
            yield from _read_tfds(part, config, reading)
        elif part.kind == "parquet":
            yield from _read_parquet(part, config, reading)
        elif part.kind == "jsonl":
            yield from _read_json_lines(part, config, reading)
        else:
            yield from _read_files(part, config, reading)
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


def _kind(path: epath.Path) -> tuple[str, bool]:
    """What a file holds, by its name, and whether it is compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] != [] and suffixes[-1] in ZIPPED
    last = suffixes[-2:-1] if zipped else suffixes[-1:]
    if last and last[0] in JSON_LINES:
        return "jsonl", zipped
    if last and last[0] in PARQUET:
        return "parquet", zipped
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
        yield from _document(data, name, config, reading)


def _read_json_lines(part: Part, config: DataConfig, reading: Reading) -> Iterator[str]:
    path = epath.Path(part.paths[0])
    # The text of a line is at most as long as the line; escapes (\u00e9) make the line longer.
    limit = 6 * config.max_document_bytes + 1024
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
                    reading.skip(_too_long(config), where)
                    continue
            except DAMAGED:
                reading.skip("damaged compressed file", where)
                return
            reading.position = raw.tell() - part.start
            if line.strip():
                yield from _json_document(line, where, config, reading)


def _rest_of_line(file: Any, limit: int) -> int:
    """Reads past the next newline, in little memory; how many bytes that were."""
    taken = 0
    while piece := file.readline(limit):
        taken += len(piece)
        if piece.endswith(b"\n"):
            break
    return taken


def _json_document(line: bytes, where: str, config: DataConfig, reading: Reading) -> Iterator[str]:
    try:
        record: Any = json.loads(line)
    except UnicodeDecodeError:
        reading.skip("invalid UTF-8", where)
        return
    except (json.JSONDecodeError, RecursionError):
        reading.skip("broken JSON line", where)
        return
    text = record.get(config.text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        reading.skip(f"no text in field {config.text_field!r}", where)
        return
    # JSON may hold half of a surrogate pair, which is no Unicode text.
    yield from _document(text.encode("utf-8", "surrogatepass"), where, config, reading)


def _parquet_parts(path: epath.Path, size: int, config: DataConfig) -> Iterator[Part]:
    import pyarrow
    from pyarrow import parquet

    try:
        with path.open("rb") as raw:
            file = parquet.ParquetFile(raw)
            names = file.schema_arrow.names
            groups = [
                file.metadata.row_group(g).total_byte_size for g in range(file.num_row_groups)
            ]
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from error
    if config.text_field not in names:
        raise UserError(f"{path} has no column {config.text_field!r}; it has {', '.join(names)}")
    start, total = 0, 0
    for group, length in enumerate(groups):
        total += length
        if total >= config.part_bytes or group == len(groups) - 1:
            share = size * (group + 1 - start) // len(groups)
            yield Part("parquet", (str(path),), start, group + 1, share)
            start, total = group + 1, 0


def _read_parquet(part: Part, config: DataConfig, reading: Reading) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    path = part.paths[0]
    with epath.Path(path).open("rb") as raw:
        file = parquet.ParquetFile(raw)
        for group in range(part.start, part.stop):  # a damaged one costs only itself
            where = f"{path}, row group {group}"
            batches = file.iter_batches(256, row_groups=[group], columns=[config.text_field])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            try:
                yield from _texts(values, where, config, reading)
            except (pyarrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno:  # the disk's, not the decoder's
                    raise
                reading.skip("damaged Parquet row group", where)
    reading.position = part.size


def _texts(
    values: Iterable[Any], where: str, config: DataConfig, reading: Reading
) -> Iterator[str]:
    for number, value in enumerate(values):
        place = f"{where}, number {number}"
        if isinstance(value, str):
            value = value.encode("utf-8", "surrogatepass")
        if isinstance(value, bytes):
            yield from _document(value, place, config, reading)
        else:
            reading.skip(f"no text in field {config.text_field!r}", place)


def _tfds_builder(name: str, config: DataConfig) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, data_dir=config.tfds_data_dir or None)
    except (tfds.core.DatasetNotFoundError, ValueError, OSError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"data.source: cannot open the TFDS dataset {name}: {reason}") from error


def _tfds_parts(name: str, config: DataConfig) -> list[Part]:
    builder = _tfds_builder(name, config)
    splits = builder.info.splits
    if config.tfds_split not in splits:
        raise UserError(
            f"data.tfds_split={config.tfds_split!r}: {name} has {', '.join(splits) or 'no splits'}"
            + ("" if splits else "; is it in data.tfds_data_dir?")
        )
    if config.text_field not in builder.info.features:
        fields = ", ".join(builder.info.features)
        raise UserError(f"{name} has no feature {config.text_field!r}; it has {fields}")
    split = splits[config.tfds_split]
    total, size = split.num_examples, split.num_bytes
    count = max(1, min(total, -(-size // config.part_bytes)))
    edges = [total * index // count for index in range(count + 1)]
    return [
        Part("tfds", (name,), start, stop, size // count)
        for start, stop in itertools.pairwise(edges)
    ]


def _read_tfds(part: Part, config: DataConfig, reading: Reading) -> Iterator[str]:
    import tensorflow_datasets as tfds

    builder = _tfds_builder(part.paths[0], config)
    split = f"{config.tfds_split}[{part.start}:{part.stop}]"
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        rows = tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))
    else:  # random-access formats cannot be read as a tf.data.Dataset
        rows = iter(builder.as_data_source(split=split))
    values = (row[config.text_field] for row in rows)
    yield from _texts(values, f"{part.paths[0]} {split}", config, reading)
    reading.position = part.size


def _too_long(config: DataConfig) -> str:
    return f"longer than {config.max_document_bytes:,} bytes"


def _document(data: bytes, where: str, config: DataConfig, reading: Reading) -> Iterator[str]:
    if len(data) > config.max_document_bytes:
        reading.skip(_too_long(config), where)
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        reading.skip("invalid UTF-8", where)
        return
    if not text.strip():
        reading.skip("empty", where)
        return
    yield text
