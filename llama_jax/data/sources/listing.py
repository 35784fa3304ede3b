"""The files that a source names: a list of paths, folders and globs, or several named lists.

If a path with exactly the given name exists, it is used, even if it contains special characters
such as `*`, `,` or `=`. A folder stands for all files below it. Files that are not text of the user
are left out and counted.
"""

import contextlib
import functools
import glob
import os
import pathlib
import re
import sysconfig
from collections.abc import Sequence

from etils import epath

from llama_jax.data.sources.folder_walk import DEAD, HIDDEN, SPECIAL, TWICE, Walk
from llama_jax.data.sources.part import Tally
from llama_jax.errors import UserError
from llama_jax.files import expand, is_object_store

# These folders hold no typical Python code: tests of odd syntax, generated tables, third-party
# packages.
STDLIB_EXCLUDED = (
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
    *("lib2to3", "encodings", "pydoc_data"),
)
FOLDERS = "folders that match a glob (a glob names only files)"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WILDCARD = re.compile(r"[*?\[]")
_JOINED = 8  # maximum number of pieces that are tried as one path with commas in it


def named_sources(source: str) -> dict[str, str]:
    """Splits `web=a/*.jsonl; books=b/*.txt` by name; a source without names gets the name ''.

    A path that exists or a glob that matches is not split, even if it looks like NAME=FILES.

    Raises:
      UserError: an item is not NAME=FILES, its name cannot be the name of a folder, or a name
        occurs twice.
    """
    if "=" not in source or _is_there(source) or _is_there(_split(source)[0]):
        return {"": source}
    found: dict[str, str] = {}
    pieces = source.split(";")
    while pieces:
        item = pieces[0]
        name, _, spec = (piece.strip() for piece in item.partition("="))
        taken = 1
        if _is_named(item):
            taken = _joined([item.partition("=")[2], *pieces[1:]], ";")
            spec = ";".join([spec, *pieces[1:taken]]).strip()
        elif item.strip():
            spec = ""
        del pieces[:taken]
        if not item.strip():
            continue
        if not spec:
            raise UserError(
                f"data.source: {item.strip()!r} is not NAME=FILES, and there is no such file"
            )
        if name in found:
            raise UserError(f"data.source names {name!r} twice")
        found[name] = spec
    return found


def _is_named(item: str) -> bool:
    name, mark, _ = item.partition("=")
    return bool(mark and _NAME.fullmatch(name.strip()))


def _place(text: str) -> epath.Path:
    """Returns the path that a text names.

    Raises:
      UserError: the text is a URL with a scheme that cannot be read.
    """
    if not _SCHEME.match(text):  # NAME=gs://BUCKET does not match
        return epath.Path(pathlib.PurePath(text)).expanduser()
    try:
        return epath.Path(expand(text))
    except UserError as error:
        raise UserError(f"data.source: {error}") from error


def _is_there(path: str) -> bool:
    """Returns whether a path exists or a glob matches something."""
    with contextlib.suppress(OSError, ValueError):
        place = _place(path)
        if place.exists():
            return True
        return bool(_WILDCARD.search(str(place)) and "**" not in str(place) and _glob(place)[0])
    return False


def _split(source: str) -> list[str]:
    """Splits a comma-separated list; a path that exists is one item, even if it has commas."""
    pieces = source.split(",")
    items: list[str] = []
    while pieces:
        taken = _joined(pieces, ",")
        item = ",".join(pieces[:taken])
        exists = not is_object_store(item) and _exists(_place(item))
        items.append(item if exists else item.strip())
        del pieces[:taken]
    return items


def _joined(pieces: list[str], mark: str) -> int:
    """Returns how many of the first pieces, joined by `mark`, are one existing path.

    If no number of pieces is an existing path, and the first piece alone does not exist either, the
    joined pieces may also be a glob that matches. Otherwise returns 1.
    """
    if is_object_store(pieces[0]):
        return 1
    joined = [mark.join(pieces[:n]).strip() for n in range(1, min(_JOINED, len(pieces)) + 1)]
    for is_meant in (lambda path: _exists(_place(path)), _is_there):
        for count in range(len(joined), 1, -1):
            if is_meant(joined[count - 1]):
                return count
        if _is_there(joined[0]):
            break
    return 1


def list_files(
    source: str, own: Sequence[epath.PathLike] = (), tally: Tally | None = None, name: str = ""
) -> list[epath.Path]:
    """Lists the files that a source names, sorted, each once.

    Args:
      source: `stdlib`, or a comma-separated list of files, folders and globs.
      own: folders that this run writes; they are left out of the folders that contain them.
      tally: receives the counts of files and folders that are left out.
      name: name of the source, for errors.

    Raises:
      UserError: a path does not exist or is a pipe or a device, a glob matches no file or contains
        `**`, a folder holds no file to read, or a folder was written by llama_jax.
    """
    if source == "stdlib":
        root = epath.Path(sysconfig.get_paths()["stdlib"])
        walk = Walk((), Tally(), STDLIB_EXCLUDED)
        files = (path for path in walk.files_below(root) if path.suffix == ".py")
        return sorted(files, key=lambda path: path.parts)
    tally = Tally() if tally is None else tally
    walk = Walk(own, tally)
    found: set[str] = set()
    items = [source] if _exists(_place(source)) else _split(source)
    items = list(filter(None, items))
    if not items:
        raise UserError(f"data.source={source!r} names no file; try stdlib or a path")
    for pattern in items:
        path = _place(pattern)
        if _exists(path):
            matches = walk.files_of_root(path) if path.is_dir() else [_file(path)]
        elif _WILDCARD.search(str(path)):
            matches = _matches(path, pattern, tally)
        else:
            raise UserError(f"data.source: {pattern} does not exist{_how_to_name(pattern, name)}")
        found.update(str(match) for match in matches)
    return _once([epath.Path(match) for match in sorted(found)], tally)


def _exists(path: epath.Path) -> bool:
    try:
        return bool(path.exists())
    except (OSError, ValueError):  # the name is too long, or contains a NUL
        return False


def _how_to_name(pattern: str, name: str) -> str:
    if pattern == "stdlib" or pattern.startswith("tfds:"):
        return f" as a file; write it as a source of its own, such as code=files; more={pattern}"
    if name:
        return f" (a path that has '=' in it is written ./{name}={pattern})"
    return ""


def _file(path: epath.Path) -> epath.Path:
    """Returns a path that the user named; checks that it is a file.

    Raises:
      UserError: the path is a pipe or a device.
    """
    if not _is_file(path):
        raise UserError(
            f"data.source: {path} is a pipe or a device, not a file; a source is read more than "
            "once, so write its contents to a file first"
        )
    return path


def _is_file(path: epath.Path) -> bool:
    # On a local disk, `epath` also calls pipes and devices files.
    return bool(path.is_file()) if is_object_store(path) else os.path.isfile(path)


def _matches(path: epath.Path, pattern: str, tally: Tally) -> list[epath.Path]:
    """Returns the files that a glob matches.

    Raises:
      UserError: the glob matches no file, or contains `**`.
    """
    if "**" in str(path):  # listing a bucket this way could take hours
        raise UserError(
            f"data.source: {pattern} has '**'; name the folder instead, then all files below it "
            "are read"
        )
    matches, hidden = _glob(path)
    folders = [match for match in matches if match.is_dir()]
    files = [match for match in matches if match not in set(folders) and _is_file(match)]
    for reason, places in ((HIDDEN, hidden), (FOLDERS, folders)):
        for place in places:
            tally.leave_out(reason, str(place))
    for place in set(matches) - set(folders) - set(files):
        tally.leave_out(DEAD if os.path.islink(place) else SPECIAL, str(place))
    if not files:
        what = "only folders; name a folder itself to read all files below it" if folders else ""
        what = what or ("only hidden files" if hidden else "no file")
        raise UserError(f"data.source: {pattern} matches {what}")
    return files


def _glob(path: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
    """Returns the paths that a pattern matches, and the hidden paths that it leaves out."""
    if is_object_store(path):
        return list(path.parent.glob(path.name)), []
    # The names of existing folders may contain brackets, which are then not a pattern.
    parts = path.parts
    root, rest = "", list(parts)
    while len(rest) > 1 and os.path.isdir(os.path.join(root, rest[0])):
        root = os.path.join(root, rest.pop(0))
    pattern = os.path.join(glob.escape(root), *rest)
    matches = sorted(glob.glob(pattern))
    hidden = set(glob.glob(pattern, include_hidden=True)) - set(matches)
    return [epath.Path(name) for name in matches], [epath.Path(name) for name in sorted(hidden)]


def _once(paths: list[epath.Path], tally: Tally) -> list[epath.Path]:
    """Removes the files that are links to other files of the list."""
    folder = functools.cache(os.path.realpath)
    seen: set[str] = set()
    kept = []
    # A file comes before the links to it, so that it is read under its own name.
    for link in (False, True):
        for path in paths:
            if is_object_store(path):
                real, is_link = str(path), False
            else:
                is_link = os.path.islink(path)
                parent = folder(os.path.dirname(path))
                real = os.path.realpath(path) if is_link else os.path.join(parent, path.name)
            if is_link != link:
                continue
            if real in seen:
                tally.leave_out(TWICE, str(path))
            else:
                kept.append(path)
            seen.add(real)
    return sorted(kept, key=str)
