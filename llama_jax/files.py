"""Small files of a folder that others read, too."""

import os

from etils import epath


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
