"""Paths that users type, small files of a run, and checksum lists that reveal damaged files."""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import IO, Any

from etils import epath

from llama_jax.errors import UserError, as_user_error, first_line

_THREADS, _CHUNK_BYTES = 16, 1 << 20  # for hashing files
_FORMATS = ("hf", "meta", "ckpt", "peft", "gguf")  # of weights, in FORMAT:DIR


def expand(path: str) -> str:
    """Replaces a leading `~` or `~USER` by the home folder, and removes a leading `file://`.

    A shell expands `~` only at the beginning of a word, and so not in `--workdir=~/runs`.

    Args:
      path: a local path; or a path in an object store, which is returned unchanged.

    Raises:
      UserError: the user does not exist, `file://` has no absolute path, or the scheme of the URL
        is not supported.
    """
    if path.lower().startswith("file://"):
        local = path[len("file://") :].removeprefix("localhost")
        if not local.startswith("/"):
            raise UserError(f"{path} is not file:///FOLDER; give the path alone")
        return local
    if "://" in path:
        try:
            epath.Path(path)
        except KeyError as error:  # not in epath's table of schemes
            raise UserError(
                f"{path}: paths of {path.partition('://')[0]}:// cannot be read; give a local "
                "path, or one of gs://"
            ) from error
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/")[0]
        raise UserError(f"there is no home folder {user}; write ./{path} for a file of that name")
    return expanded


def expand_place(place: str) -> str:
    """Applies `expand` to the folder in FORMAT:DIR; any other text is treated as a path.

    Raises:
      UserError: see `expand`.
    """
    kind, colon, folder = place.partition(":")
    if not colon or kind not in _FORMATS:
        return expand(place)
    return f"{kind}:{expand(folder)}"


def is_object_store(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket (`gs://`), without locks and renaming of folders."""
    return "://" in os.fspath(path)


def refuse_lfs_pointer(content: bytes, name: str) -> None:
    """Raises `UserError` if a file is only the pointer that Git LFS leaves in its place.

    Args:
      content: the content of the file, or its beginning.
      name: name of the file, for the message.
    """
    if content.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{name} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"
        )


def parse_json(content: bytes | str, name: str) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
      content: text, or bytes in UTF-8, UTF-16 or UTF-32.
      name: name of the file, for the message.

    Raises:
      UserError: the content is not JSON, not an object, or nested too deeply.
    """
    beginning = content[:100]
    refuse_lfs_pointer(
        beginning if isinstance(beginning, bytes) else beginning.encode(errors="replace"), name
    )
    with as_user_error(name):
        try:
            values = json.loads(content)
        except ValueError as error:  # also for undecodable bytes and numbers that are too long
            raise UserError(f"{name} is not valid JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{name} is not a JSON object, but {type(values).__name__}")
    return values


def read_bytes(path: epath.Path) -> bytes:
    """Reads the contents of a file.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def text_of(content: bytes, name: str) -> str:
    """Decodes the content of a file as UTF-8, without a byte order mark.

    Raises:
      UserError: the content is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not text in UTF-8: {error}") from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
      UserError: the file cannot be read or parsed; see `parse_json`.
    """
    return parse_json(read_bytes(path), str(path))


def read_jsonl(jsonl: epath.Path) -> tuple[list[dict[str, Any]], int]:
    """Reads the records of a file with one JSON object per line, as `append_jsonl` writes them.

    A killed process may have cut a line off, and a bad disk may have changed one: lines that are
    not objects, or whose `step` is not a whole number, are left out.

    Returns:
      The records, and the number of lines that were left out.

    Raises:
      UserError: the file cannot be read.
    """
    lines = [line for line in read_bytes(jsonl).splitlines() if line.strip()]
    records = [record for record in map(_record, lines) if record is not None]
    return records, len(lines) - len(records)


def _record(line: bytes) -> dict[str, Any] | None:
    """Parses a line of a file of records; returns None for a damaged line."""
    try:
        record = json.loads(line.strip(b"\0"))  # zero bytes that a power failure may leave
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < 2**63 else None


_appending = threading.Lock()  # background saves append to the log, too


def append_jsonl(jsonl: epath.Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends records to a file, each as one line of JSON.

    They begin on a new line, even if a killed process has cut off the last one. A partial write is
    removed again, as far as the disk allows.

    Raises:
      OSError: the records cannot be written.
    """
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    with _appending:
        size = size_of(jsonl) if jsonl.exists() else 0
        if size and _last_byte(jsonl, size) != b"\n":
            data = b"\n" + data
        try:
            with jsonl.open("ab") as file:
                file.write(data)
        except OSError:
            if not is_object_store(jsonl):
                with contextlib.suppress(OSError):
                    os.truncate(jsonl, size)
            raise


def _last_byte(path: epath.Path, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(size - 1)
        return file.read(1)


def size_of(path: epath.Path) -> int:
    """Returns the bytes of a file; epath's `stat` fails if its owner has no name on this host."""
    return path.stat().length if is_object_store(path) else os.path.getsize(path)


def number(record: dict[str, Any], name: str) -> float | None:
    """Returns a number of a record; None if it is absent, negative, not finite or too large."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 <= value < 2**63 else None


def open_file(path: epath.PathLike) -> IO[bytes]:
    """Opens a file for reading, unbuffered if local, since epath's `open` takes twice as long."""
    return epath.Path(path).open("rb") if is_object_store(path) else open(path, "rb", 0)


def sha256_of(path: epath.PathLike) -> str:
    """Computes the sha256 of a file, in hexadecimal.

    Raises:
      OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open_file(path) as file:  # `hashlib.file_digest` does not read files of a bucket
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_each(paths: Iterable[epath.PathLike]) -> Iterator[str | OSError]:
    """Yields the sha256 of each file, in order; for a file that cannot be read, the error.

    Threads read ahead. A caller that stops early waits only for the files that are being read.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(_sha256_or_error, paths)


def _sha256_or_error(path: epath.PathLike) -> str | OSError:
    try:
        return sha256_of(path)
    except OSError as error:
        return error


def files_below(folder: epath.Path, items: Collection[str] = ()) -> dict[str, epath.Path]:
    """Lists the files below a folder, by their path relative to it, in sorted order.

    Args:
      folder: the folder.
      items: names of folders in it; only these are listed. Empty: all files are listed.
    """
    places = [folder / item for item in items if (folder / item).is_dir()] if items else [folder]
    paths = [path for place in places for path in _walk(place)]
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in paths))


def _walk(folder: epath.Path, above: tuple[str, ...] = ()) -> Iterator[epath.Path]:
    """Yields the files below a folder; follows links to folders, except links back up."""
    above = (*above, os.path.realpath(folder))
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif os.path.realpath(path) not in above:
            yield from _walk(path, above)


def encode_entries(entries: dict[str, dict[str, Any]]) -> str:
    """Encodes a list of files, with a checksum of the list itself, to detect damage to it.

    Args:
      entries: path of each file -> its size and sha256, as `entry_of` gives them; an optional
        `before` holds an older entry that is accepted as well.
    """
    body = json.dumps(entries, indent=1, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"format": 1, "sha256": "{digest}", "files": {body}}}\n'


def read_entries(path: epath.Path) -> dict[str, dict[str, Any]] | None:
    """Reads a list of files that `encode_entries` encoded; returns None if it is damaged."""
    try:
        data = path.read_bytes()
        entries = parse_json(data, path.name).get("files")
    except (OSError, UserError):
        return None
    if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
        return None
    return entries if data == encode_entries(entries).encode() else None


def damages(
    path: epath.Path,
    items: Collection[str] = (),
    part: tuple[int, int] = (0, 1),
    hashed: Callable[[str, int], bool] = lambda name, size: True,
) -> Iterator[str]:
    """Compares a folder with the list of its files; yields a line for each difference.

    Args:
      path: path of the list, which is in the folder.
      items: names of folders in it; only their files are compared. Empty: all files.
      part: (index, count) of this process, which reads every count-th file.
      hashed: (name, bytes) of a file -> whether to read it; otherwise only its size is compared.

    Raises:
      OSError: the folder cannot be listed.
    """
    if not path.exists():
        yield f"{path.name} is missing"
        return
    entries = read_entries(path)
    if entries is None:
        yield f"{path.name} is not as it was written"
        return
    if items:
        entries = {n: entry for n, entry in entries.items() if n.partition("/")[0] in items}
        listed = {name.partition("/")[0] for name in entries}
        yield from (f"{item} is missing" for item in items if item not in listed)
    found = files_below(path.parent, items)
    missing = [name for name in entries if name not in found]
    if missing:
        yield from (f"{name} is missing" for name in missing)
        return
    sizes = {name: size_of(found[name]) for name in entries}
    for name, size in sizes.items():
        if reason := mismatch(name, {"bytes": size}, entries[name]):
            yield reason
    mine = [name for name in list(entries)[part[0] :: part[1]] if hashed(name, sizes[name])]
    digests = sha256_of_each(found[name] for name in mine)
    for name, digest in zip(mine, digests, strict=True):
        if isinstance(digest, OSError):  # a failing disk
            yield f"{name} cannot be read: {digest.strerror or digest}"
        elif reason := mismatch(name, {"bytes": sizes[name], "sha256": digest}, entries[name]):
            yield reason


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        and ("before" not in entry or _is_entry(entry["before"]))
    )


def entry_of(content: bytes) -> dict[str, Any]:
    """Returns the entry of a list of files for a file with this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def mismatch(name: str, found: dict[str, Any], entry: dict[str, Any]) -> str:
    """Describes how a file differs from its entry in a list of files; empty if it does not.

    Args:
      name: name of the file, for the message.
      found: the `bytes` of the file, and its `sha256` if it was read.
      entry: the entry in the list.
    """
    before = entry.get("before")
    now = {key: entry[key] for key in ("bytes", "sha256")}
    accepted = [now] if before is None else [now, before]
    if found["bytes"] not in [each["bytes"] for each in accepted]:
        return f"{name} has {found['bytes']} bytes, {entry['bytes']} were written"
    if "sha256" in found and found not in accepted:
        return f"{name} holds other bytes than were written"
    return ""


def write_atomically(path: epath.Path, data: bytes) -> None:
    """Writes a file completely or not at all; leaves a file with the same content untouched."""
    with contextlib.suppress(OSError):  # the file is missing or cannot be read
        if path.read_bytes() == data:
            return
    temporary = path.parent / f"{path.name}.tmp-{os.getpid()}"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: epath.PathLike, message: str) -> Iterator[None]:
    """Makes a folder and locks it for this process; the lock ends with the process at the latest.

    Buckets have no locks, and some network file systems refuse them: there this locks nothing.

    Args:
      folder: the folder to lock.
      message: message of the error if another process holds the lock.

    Raises:
      UserError: `message`.
      OSError: the folder cannot be made.
    """
    if is_object_store(folder):
        yield
        return
    while (handle := _hold(folder, message)) is None:
        pass  # the folder was removed or recreated after it was opened
    try:
        yield
    finally:
        os.close(handle)


def _hold(folder: epath.PathLike, message: str) -> int | None:
    """Opens and locks a folder; returns None if the path now leads to another folder."""
    os.makedirs(folder, exist_ok=True)
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
    except BlockingIOError:
        os.close(handle)
        raise UserError(message) from None
    except FileNotFoundError:
        pass
    except OSError:
        return handle  # this file system has no locks
    os.close(handle)
    return None
