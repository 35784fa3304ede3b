"""Paths as users type them, small files of a run, and lists by which damage to them is found."""

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

_THREADS, _CHUNK_BYTES = 16, 1 << 20  # that hash files
_FORMATS = ("hf", "meta", "ckpt", "peft", "gguf")  # of weights, in FORMAT:DIR


def expand(path: str) -> str:
    """A path with the home folder in place of a first `~` or `~USER`, and without `file://`.

    A shell expands them at the beginning of a word only, so `--workdir=~/runs` comes as it is
    typed.

    Args:
      path: a local path, or one of an object store, which stays as it is.

    Raises:
      UserError: there is no such user, `file://` has no absolute path, or a URL is of a kind that
        cannot be read.
    """
    if path.lower().startswith("file://"):
        local = path[len("file://") :].removeprefix("localhost")
        if not local.startswith("/"):
            raise UserError(f"{path} is not file:///FOLDER; give the path alone")
        return local
    if "://" in path:
        try:
            epath.Path(path)
        except KeyError as error:  # of its table of schemes
            raise UserError(
                f"{path}: paths of {path.partition('://')[0]}:// cannot be read; name a local one, "
                "or one of gs://"
            ) from error
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/")[0]
        raise UserError(f"there is no home folder {user}; a file of that name here is ./{path}")
    return expanded


def expand_place(place: str) -> str:
    """FORMAT:DIR with its folder as `expand` gives it; any other text is a path.

    Raises:
      UserError: as `expand`.
    """
    kind, colon, folder = place.partition(":")
    if not colon or kind not in _FORMATS:
        return expand(place)
    return f"{kind}:{expand(folder)}"


def is_object_store(path: epath.PathLike) -> bool:
    """Whether a path is of a bucket (`gs://`): no locks there, no folder that could be renamed."""
    return "://" in os.fspath(path)


def refuse_lfs_pointer(content: bytes, name: str) -> None:
    """Raises `UserError` where a file is only the pointer that Git LFS leaves in its place.

    Args:
      content: of the file, or its beginning.
      name: the file.
    """
    if content.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{name} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"
        )


def parse_json(content: bytes | str, name: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
      content: bytes in UTF-8, UTF-16 or UTF-32, or text.
      name: the file, for errors.

    Raises:
      UserError: it is not JSON, not an object, or nested too deeply.
    """
    beginning = content[:100]
    refuse_lfs_pointer(
        beginning if isinstance(beginning, bytes) else beginning.encode(errors="replace"), name
    )
    with as_user_error(name):
        try:
            values = json.loads(content)
        except ValueError as error:  # bytes that are no text, and numbers that are too long, too
            raise UserError(f"{name} is not valid JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{name} is not a JSON object, but {type(values).__name__}")
    return values


def read_bytes(path: epath.Path) -> bytes:
    """The contents of a file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def text_of(content: bytes, name: str) -> str:
    """The text of a file in UTF-8.

    Raises:
      UserError: it is in another encoding, or no text.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not text in UTF-8: {error}") from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: it cannot be read, or as `parse_json`.
    """
    return parse_json(read_bytes(path), str(path))


def read_jsonl(jsonl: epath.Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a file with one JSON object in each line, as `append_jsonl` writes them.

    A kill may cut a line off, and a disk may change one: a line that is no object, or whose `step`
    is no whole number, is left out.

    Returns:
      The records, and how many lines were left out.

    Raises:
      UserError: the file cannot be read.
    """
    lines = [line for line in read_bytes(jsonl).splitlines() if line.strip()]
    found = [record for record in map(_record, lines) if record is not None]
    return found, len(lines) - len(found)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if there is none."""
    try:
        record = json.loads(line.strip(b"\0"))  # a machine that lost power may have left some
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 <= step < 2**63 else None


_appending = threading.Lock()  # saves in the background log, too


def append_jsonl(jsonl: epath.Path, records: Iterable[dict[str, Any]]) -> None:
    """Adds records to a file, each as one line of JSON.

    They begin on a new line, even if a kill has cut off the last one. What cannot be written whole
    is removed again, as far as the disk allows.

    Raises:
      OSError: they could not be written.
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
    """Bytes of a file; epath's `stat` fails where the file's owner has no name on this machine."""
    return path.stat().length if is_object_store(path) else os.path.getsize(path)


def number(record: dict[str, Any], name: str) -> float | None:
    """The number that a record has under a name; None if it is not finite, or less than 0."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 <= value < 2**63 else None


def open_file(path: epath.PathLike) -> IO[bytes]:
    """Opens a file for reading, unbuffered if it is local: epath's `open` takes twice as long."""
    return epath.Path(path).open("rb") if is_object_store(path) else open(path, "rb", 0)


def sha256_of(path: epath.PathLike) -> str:
    """The sha256 of a file, in hexadecimal.

    Raises:
      OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_file(path) as file:  # `hashlib.file_digest` does not read files of a bucket
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_each(paths: Iterable[epath.PathLike]) -> Iterator[str | OSError]:
    """The sha256 of files, in their order; in place of one that cannot be read, its error.

    Threads read ahead. A caller that stops early waits for the files that they are reading, not
    for the others.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(_sha256_or_error, paths)


def _sha256_or_error(path: epath.PathLike) -> str | OSError:
    try:
        return sha256_of(path)
    except OSError as error:
        return error


def files_below(folder: epath.Path, items: Collection[str] = ()) -> dict[str, epath.Path]:
    """Files below a folder, sorted by their path from there.

    Args:
      folder: to list.
      items: folders in it; only these are listed. Empty: all is.
    """
    places = [folder / item for item in items if (folder / item).is_dir()] if items else [folder]
    found = [path for place in places for path in _walk(place)]
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in found))


def _walk(folder: epath.Path, above: tuple[str, ...] = ()) -> Iterator[epath.Path]:
    """Files below a folder; links to other folders are followed, but not those that lead back."""
    above = (*above, os.path.realpath(folder))
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif os.path.realpath(path) not in above:
            yield from _walk(path, above)


def encode_entries(entries: dict[str, dict[str, Any]]) -> str:
    """The text of a list of files, with a checksum of its own: damage to it is not laid on them.

    Args:
      entries: size and sha256 of each file, as `entry_of` gives them, by its path; and `before`, an
        entry that is accepted as well.
    """
    body = json.dumps(entries, indent=1, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"format": 1, "sha256": "{digest}", "files": {body}}}\n'


def read_entries(path: epath.Path) -> dict[str, dict[str, Any]] | None:
    """The list of files that `encode_entries` wrote; None if it is not as it was written."""
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
    """Compares a folder with the list of its files; gives a line for each difference.

    Args:
      path: of the list, which lies in the folder.
      items: folders in it; only their files are compared. Empty: all are.
      part: (index, count) of the process: it reads every count-th file.
      hashed: name and bytes of a file -> whether it is read; of others, only the size is compared.

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
        if isinstance(digest, OSError):  # a disk that gives up
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
    """What a list of files says about a file with this content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def mismatch(name: str, found: dict[str, Any], entry: dict[str, Any]) -> str:
    """How a file differs from its entry in a list of files; empty if it does not.

    Args:
      name: of the file, for the message.
      found: its `bytes`, and its `sha256` if it was read.
      entry: of the list.
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
    """Writes a file that is there whole or not at all, and leaves alone one that is so already."""
    with contextlib.suppress(OSError):  # it is not there, or cannot be read
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
    """Makes a folder and holds it for this process, until it ends in whatever way.

    Buckets have no such locks, and some network file systems refuse them: there nobody is kept out.

    Args:
      folder: to hold.
      message: of the error, where another process holds it.

    Raises:
      UserError: `message`.
      OSError: the folder cannot be made.
    """
    if is_object_store(folder):
        yield
        return
    while (handle := _hold(folder, message)) is None:
        pass  # the folder was removed, or made again, since it was opened
    try:
        yield
    finally:
        os.close(handle)


def _hold(folder: epath.PathLike, message: str) -> int | None:
    """An open file that holds a folder; None if it is another folder than the path has now."""
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
        return handle  # no locks here
    os.close(handle)
    return None
