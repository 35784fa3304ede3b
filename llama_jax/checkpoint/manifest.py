"""The manifest of a saved step: size and sha256 of every file, so that damage has a name.

It is written when all else in the folder is, and before the folder gets its final name; hashing
reads the files once, in threads. What it costs for 65B (780 GB of weights and moments) is reading
them: on several processes each checks its share, see `first_damage`.
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

# A quick check reads the description and files up to this size; of larger ones the size only.
QUICK_BYTES = 16 * 2**20


def write(folder: epath.Path) -> None:
    """Writes the manifest of all that is in `folder`, and has the disk confirm it."""
    files = files_below(folder)
    files.pop(MANIFEST, None)
    entries = {}
    for name, digest in zip(files, sha256_of_each(files.values()), strict=True):
        if isinstance(digest, OSError):
            raise digest
        entries[name] = {"bytes": size_of(files[name]), "sha256": digest}
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
    if os.path.islink(folder) and not folder.exists():  # of a disk that is not mounted, perhaps
        return f"it is a link to {os.path.realpath(folder)}, where nothing is"

    def hashed(name: str, size: int) -> bool:
        return not quick or size <= QUICK_BYTES or name.partition("/")[0] in DESCRIPTION

    try:
        return next(damages(folder / MANIFEST, items, part, hashed), "")
    except OSError as error:
        return f"its files cannot be listed: {error.strerror or error}"
