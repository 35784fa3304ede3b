"""The manifest of a saved step: size and sha256 of every file, so that damage has a name.

It is written when all else in the folder is, and before the folder gets its final name; hashing
reads the files once, in threads. What it costs for 65B (780 GB of weights and moments) is reading
them: on several processes each checks its share, see `first_damage`.
"""

import concurrent.futures
import hashlib
import os
from collections.abc import Collection, Iterator
from typing import Any

from etils import epath

from llama_jax.errors import UserError
from llama_jax.files import (
    encode_entries,
    entry_of,
    is_object_store,
    mismatch,
    read_entries,
    read_json,
    size_of,
)
from llama_jax.text.saved_tokenizer import DESCRIPTION, MANIFEST

# A quick check reads the description and files up to this size; of larger ones the size only.
QUICK_BYTES = 16 * 2**20
_THREADS = 16


def _files(folder: epath.Path, items: Collection[str] = ()) -> dict[str, epath.Path]:
    """Files below the folder but the manifest, by their path from there; of all items, or these."""
    places = [folder / item for item in items if (folder / item).is_dir()] if items else [folder]
    found = [path for place in places for path in _walk(place)]
    named = {path.relative_to(folder).as_posix(): path for path in found}
    named.pop(MANIFEST, None)
    return dict(sorted(named.items()))


def _walk(folder: epath.Path, above: tuple[str, ...] = ()) -> Iterator[epath.Path]:
    """Files below a folder; links to other folders are followed, but not those that lead back."""
    above = (*above, os.path.realpath(folder))
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif os.path.realpath(path) not in above:
            yield from _walk(path, above)


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(folder: epath.Path) -> None:
    """Writes the manifest of all that is in `folder`, and has the disk confirm it."""
    files = _files(folder)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(_sha256, files.values())
        entries = {
            name: {"bytes": size_of(path), "sha256": digest}
            for (name, path), digest in zip(files.items(), digests, strict=True)
        }
    _replace(folder / MANIFEST, encode_entries(entries).encode())


def amend(folder: epath.Path, name: str, content: bytes) -> None:
    """Replaces a file of a saved step, which is verified at every moment.

    For as long as that takes, the manifest lists the file as it was and as it will be; a kill may
    leave it so.

    Args:
      folder: of the step.
      name: of the file, by its path from there.
      content: what it is to hold.

    Raises:
      UserError: the file or the manifest is not as it was written; nothing is changed.
      OSError: it cannot be written.
    """
    files = read_entries(folder / MANIFEST)
    if files is None:
        raise UserError(f"{folder / MANIFEST} is not as it was written")
    now, then = entry_of((folder / name).read_bytes()), entry_of(content)
    if name not in files or mismatch(name, now, files[name]):
        raise UserError(f"{folder / name} holds other bytes than were written")
    _replace(folder / MANIFEST, encode_entries({**files, name: {**then, "before": now}}).encode())
    _replace(folder / name, content)
    _replace(folder / MANIFEST, encode_entries({**files, name: then}).encode())


def _replace(path: epath.Path, data: bytes) -> None:
    """Writes a file that is there whole or as it was, and has the disk confirm it."""
    temporary = path.parent / f"{path.name}.tmp"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        if not is_object_store(path):
            os.fsync(file.fileno())
    temporary.replace(path)


def read_description(folder: epath.Path, item: str = "meta") -> dict[str, Any]:
    """What a step says about itself, or another item in JSON, read without orbax.

    Orbax lets all processes wait for each other there, and one alone may want to know.

    Raises:
      UserError: it is not there, or no JSON object.
    """
    return read_json(folder / item / "metadata")


def first_damage(
    folder: epath.Path,
    part: tuple[int, int] = (0, 1),
    quick: bool = False,
    items: Collection[str] = (),
) -> str:
    """The first thing that is not as it was saved, with its file's name; empty if all is well.

    Args:
      folder: a saved step.
      part: (index, count) of the process: it reads every count-th file.
      quick: of large files compare the size only.
      items: folders within the step, such as `meta`; only their files are looked at. Empty: all.
    """
    try:
        return next(iter(_damages(folder, part, quick, items)), "")
    except OSError as error:
        return f"its files cannot be listed: {error.strerror or error}"


def _damages(
    folder: epath.Path, part: tuple[int, int], quick: bool, items: Collection[str]
) -> Iterator[str]:
    if os.path.islink(folder) and not folder.exists():  # of a disk that is not mounted, perhaps
        yield f"it is a link to {os.path.realpath(folder)}, where nothing is"
        return
    if not (folder / MANIFEST).exists():
        yield f"{MANIFEST} is missing"
        return
    expected = read_entries(folder / MANIFEST)
    if expected is None:
        yield f"{MANIFEST} is not as it was written"
        return
    if items:
        expected = {n: entry for n, entry in expected.items() if n.partition("/")[0] in items}
        listed = {name.partition("/")[0] for name in expected}
        yield from (f"{item} is missing" for item in items if item not in listed)
    found = _files(folder, items)
    missing = [name for name in expected if name not in found]
    if missing:
        yield from (f"{name} is missing" for name in missing)
        return
    sizes = {name: size_of(found[name]) for name in expected}
    for name, size in sizes.items():
        if reason := mismatch(name, {"bytes": size}, expected[name]):
            yield reason
    mine = list(expected)[part[0] :: part[1]]
    if quick:
        mine = [n for n in mine if sizes[n] <= QUICK_BYTES or n.partition("/")[0] in DESCRIPTION]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        digests = [pool.submit(_sha256, found[name]) for name in mine]
        for name, digest in zip(mine, digests, strict=True):
            try:
                found_entry = {"bytes": sizes[name], "sha256": digest.result()}
                if reason := mismatch(name, found_entry, expected[name]):
                    yield reason
            except OSError as error:  # a disk that gives up
                yield f"{name} cannot be read: {error.strerror or error}"
