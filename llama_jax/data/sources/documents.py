"""The parts and documents of any source: files, TFDS datasets, or Python's standard library.

A source is cut into parts. Each part can be read alone, so that many processes can share the work
and can repeat a part. The parts depend on the names, sizes and first bytes of the files.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.sources.file_kind import FileKind, identify_file
from llama_jax.data.sources.folder_walk import THREADS
from llama_jax.data.sources.json_files import read_json_lines, read_json_list
from llama_jax.data.sources.listing import list_files
from llama_jax.data.sources.parquet import parquet_parts, read_parquet
from llama_jax.data.sources.part import Part, Tally
from llama_jax.data.sources.text_files import read_texts
from llama_jax.data.sources.tfds import read_tfds, tfds_parts
from llama_jax.errors import UserError
from llama_jax.files import size_of


def list_parts(
    source: str,
    config: DataConfig,
    own: Sequence[epath.PathLike] = (),
    tally: Tally | None = None,
    name: str = "",
) -> list[Part]:
    """Cuts one source into parts of about `config.part_bytes`.

    Args:
      source: what to read.
      config: how to read it.
      own: folders that this run writes; they are left out of the folders that contain them.
      tally: receives the number of files of each kind, and of those that are left out.
      name: name of the source, for errors.

    Raises:
      UserError: `list_files` fails, a file cannot be read, or its kind does not fit `config`.
    """
    if config.template and (source == "stdlib" or source.startswith("tfds:")):
        raise UserError(f"data.source={source} has no instruction data, which data.template needs")
    if source.startswith("tfds:"):
        return tfds_parts(source.removeprefix("tfds:"), config)
    tally = Tally() if tally is None else tally
    parts: list[Part] = []
    small: list[str] = []
    small_bytes = 0

    def close() -> None:
        nonlocal small_bytes
        if small:
            parts.append(Part("files", tuple(small), 0, -1, small_bytes))
            small.clear()
            small_bytes = 0

    for path, file in _identified(source, list_files(source, own, tally, name), config):
        size = file.size
        if not file.kind:
            tally.leave_out(file.label, str(path))
            continue
        if config.template and file.kind in ("files", "parquet"):
            raise UserError(
                f"data.source: {path} is neither .json nor .jsonl, but {file.label}; "
                "data.template reads only these two"
            )
        if file.kind != "damaged":
            tally.files[file.label] += 1
        ranges = file.as_stored and _is_cut(file.kind, size, config)
        if file.kind in ("files", "damaged") and not ranges:
            small.append(str(path))
            small_bytes += size
            if small_bytes >= config.part_bytes:
                close()
            continue
        close()
        kind = "text" if file.kind == "files" else file.kind
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


def _identified(
    source: str, files: list[epath.Path], config: DataConfig
) -> Iterator[tuple[epath.Path, FileKind]]:
    """Yields each file with its kind. Reads many files at once: buckets have a high latency."""
    if source == "stdlib":
        for path in files:
            yield path, FileKind("files", "plain text", True, size_of(path))
        return
    with ThreadPoolExecutor(min(THREADS, len(files) or 1)) as pool:
        kinds = pool.map(lambda path: identify_file(path, config), files)
        yield from zip(files, kinds, strict=True)


def _is_cut(kind: str, size: int, config: DataConfig) -> bool:
    """Returns whether a file is read in ranges of bytes."""
    if kind == "files" and not config.separator:
        return size > config.max_document_bytes
    return kind in ("files", "jsonl") and size > config.part_bytes


def read_documents(part: Part, config: DataConfig, tally: Tally) -> Iterator[str]:
    """Streams the documents of a part that are not empty.

    Args:
      part: what to read.
      config: how to read it.
      tally: receives the counts of documents that are skipped or changed.

    Raises:
      UserError: a file cannot be opened.
    """
    try:
        if part.kind == "tfds":
            yield from read_tfds(part, config, tally)
        elif part.kind == "parquet":
            yield from read_parquet(part, config, tally)
        elif part.kind == "jsonl":
            yield from read_json_lines(part, config, tally)
        elif part.kind == "json":
            yield from read_json_list(part, config, tally)
        else:
            yield from read_texts(part, config, tally)
    except OSError as error:
        path = error.filename or part.paths[0]
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_source(
    source: str,
    config: DataConfig,
    tally: Tally,
    own: Sequence[epath.PathLike] = (),
    name: str = "",
) -> Iterator[str]:
    """Streams all documents of one source, in order.

    Args:
      source: what to read.
      config: how to read it.
      tally: receives the counts of files and of documents.
      own: folders that this run writes, as in `list_parts`.
      name: name of the source, for errors.

    Raises:
      UserError: `list_parts` or `read_documents` fails.
    """
    for part in list_parts(source, config, own, tally, name):
        yield from read_documents(part, config, tally)
