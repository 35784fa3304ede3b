"""Small files of a work directory, and where they lie."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath


def is_object_store(path: epath.PathLike) -> bool:
    """Whether a path is of a bucket (`gs://`): no locks there, no folder that could be renamed."""
    return "://" in os.fspath(path)


def read_records(jsonl: epath.Path) -> Iterator[dict[str, Any]]:
    """Streams the records of a file with one in each line; a line that a kill cut off is none."""
    for line in jsonl.read_text().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def write_atomically(path: epath.Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all, and leaves alone one that is so already."""
    if path.exists() and path.read_bytes() == data:
        return
    temporary = path.parent / f"{path.name}.tmp-{os.getpid()}"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
