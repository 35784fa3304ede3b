"""The manifest of a saved step: size and sha256 of every file, so that damage is found and named.

It is written after all other files of the folder, and before the folder gets its final name.
Hashing reads each file once, in threads. For 65B (780 GB of weights and moments) the time goes into
reading; with several processes, each one checks its share (see `first_damage`).
"""

import os
from collections.abc import Collection
from typing import Any

from etils import epath

from llama_jax.errors import UserError
from llama_jax.files import (
    damages,
    encode_entries,
    entry_of,
    files_below,
    is_object_store,
    mismatch,
    read_entries,
    read_json,
    sha256_of_each,
    size_of,
)
from llama_jax.text.saved_tokenizer import DESCRIPTION, MANIFEST

# A quick check hashes the description and files up to this size, in bytes. For larger files it
# compares the size only.
QUICK_BYTES = 16 * 2**20


def write(folder: epath.Path) -> None:
    """Writes the manifest of all files in `folder`, and flushes it to disk."""
    files = files_below(folder)
    files.pop(MANIFEST, None)
    entries = {}
    for name, digest in zip(files, sha256_of_each(files.values()), strict=True):
        if isinstance(digest, OSError):
            raise digest
        entries[name] = {"bytes": size_of(files[name]), "sha256": digest}
    _replace(folder / MANIFEST, encode_entries(entries).encode())


def amend(folder: epath.Path, name: str, content: bytes) -> None:
    """Replaces a file of a saved step; the step stays valid at every moment.

    During the replacement, the manifest lists the old and the new checksum of the file. It keeps
    both if the process is killed.

    Args:
      folder: folder of the step.
      name: path of the file, relative to `folder`.
      content: new bytes of the file.

    Raises:
      UserError: the file or the manifest is damaged; nothing is changed.
      OSError: the file cannot be written.
    """
    entries = read_entries(folder / MANIFEST)
    if entries is None:
        raise UserError(f"{folder / MANIFEST} is not as it was written")
    now, then = entry_of((folder / name).read_bytes()), entry_of(content)
    if name not in entries or mismatch(name, now, entries[name]):
        raise UserError(f"{folder / name} holds other bytes than were written")
    _replace(folder / MANIFEST, encode_entries({**entries, name: {**then, "before": now}}).encode())
    _replace(folder / name, content)
    _replace(folder / MANIFEST, encode_entries({**entries, name: then}).encode())


def _replace(path: epath.Path, data: bytes) -> None:
    """Writes a file atomically (it holds all of `data` or is unchanged), and flushes it to disk."""
    temporary = path.parent / f"{path.name}.tmp"
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        if not is_object_store(path):
            os.fsync(file.fileno())
    temporary.replace(path)


def read_description(folder: epath.Path, item: str = "meta") -> dict[str, Any]:
    """Reads the description of a step, or another JSON item, without orbax.

    Orbax would make all processes wait for each other; a single process may call this.

    Raises:
      UserError: the item is missing, or is not a JSON object.
    """
    return read_json(folder / item / "metadata")


def first_damage(
    folder: epath.Path,
    part: tuple[int, int] = (0, 1),
    quick: bool = False,
    items: Collection[str] = (),
) -> str:
    """Returns the first damage to the files of a step, with the name of the file; '' if intact.

    Args:
      folder: folder of the step.
      part: (index, count) of the process, which checks every count-th file.
      quick: for large files, compare the size only.
      items: folders within the step, such as `meta`: check only their files. Empty: all files.
    """
    if os.path.islink(folder) and not folder.exists():  # perhaps the disk is not mounted
        return f"it is a link to {os.path.realpath(folder)}, which does not exist"

    def hashed(name: str, size: int) -> bool:
        return not quick or size <= QUICK_BYTES or name.partition("/")[0] in DESCRIPTION

    try:
        return next(damages(folder / MANIFEST, items, part, hashed), "")
    except OSError as error:
        return f"its files cannot be listed: {error.strerror or error}"
