"""Which files a source names: paths, folders and globs, in a list, or several lists by name.

What exists under the very words of a source is meant, whatever signs are in its name. Of a folder
all is read that is below it, but for what is not text of the user's; that is counted.
"""

import contextlib
import dataclasses
import functools
import glob
import os
import re
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from llama_jax.data.reading import Reading
from llama_jax.errors import UserError
from llama_jax.files import is_object_store

THREADS = 32  # that ask a bucket, which answers late, about files
# Not what Python is written like: tests of odd syntax, generated tables, other people's packages.
STDLIB_EXCLUDED = (
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
    *("lib2to3", "encodings", "pydoc_data"),
)
HIDDEN = "hidden files and folders"
ABOUT = "files about the data, such as README, LICENSE and checksums"
OWN = "folders that llama_jax writes: token shards and runs"
SPECIAL = "pipes, sockets and devices"
DEAD = "links to nothing"
TWICE = "links to what is read under another name"
FOLDERS = "folders that a glob matches, which names files only"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_WILDCARD = re.compile(r"[*?\[]")
_JOINED = 8  # pieces of a list that may be one path with commas in it
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|dataset_?card|data_?card)"
    r"([-_.][a-z]{2,10})?(\.(md|txt|rst|html?|cff|bib|pdf))?"
    r"|(dataset_infos?|dataset_dict|state|croissant)\.json"
    r"|_(success|metadata|common_metadata|started_\w+|committed_\w+)|thumbs\.db|desktop\.ini"
    r"|((md5|sha\d+)sums?|checksums?)(\.\w+)?"
    r"|.*(\.(lock|incomplete|crdownload|tmp|swp|md5|sha1|sha256|sha512|crc|asc|sig)|~)",
    re.IGNORECASE | re.DOTALL,
)
_ABOUT_FOLDERS = ("__pycache__", "__MACOSX", "_temporary", "_delta_log", "lost+found")
# Our own folders are known by what they hold.
_SHARD = re.compile(r"(train|validation)-\d+-\d+\.\w+|part-\d+\.json")
_PASSING = re.compile(r"\.|lost\+found$|.*\.tmp-\d+$")  # files that come and go beside others
_RUN = ("checkpoints", "metrics.jsonl", "goodput.json")


def named_sources(source: str) -> dict[str, str]:
    """`web=a/*.jsonl; books=b/*.txt` by name; a source without names is called ''.

    A path that exists, or a glob that matches, is one, although its name may look like NAME=FILES.

    Raises:
      UserError: a name that cannot be a folder, or comes twice.
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


def _is_there(path: str) -> bool:
    """Whether a path exists or a glob matches something."""
    with contextlib.suppress(OSError, ValueError):
        place = epath.Path(path).expanduser()
        if place.exists():
            return True
        return bool(_WILDCARD.search(str(place)) and "**" not in str(place) and _glob(place)[0])
    return False


def _split(source: str) -> list[str]:
    """The items of a comma-separated list; a path with commas in it is one, if it exists."""
    pieces = source.split(",")
    items: list[str] = []
    while pieces:
        taken = _joined(pieces, ",")
        item = ",".join(pieces[:taken])
        items.append(item if _exists(epath.Path(item).expanduser()) else item.strip())
        del pieces[:taken]
    return items


def _joined(pieces: list[str], mark: str) -> int:
    """How many of the first pieces, with a mark between them, are a path that exists; else 1."""
    if not is_object_store(pieces[0]):
        for count in range(min(_JOINED, len(pieces)), 1, -1):
            if _exists(epath.Path(mark.join(pieces[:count]).strip()).expanduser()):
                return count
    return 1


def list_files(
    source: str, own: Sequence[epath.PathLike] = (), reading: Reading | None = None, name: str = ""
) -> list[epath.Path]:
    """The files that a source names, sorted, each once.

    Args:
      source: `stdlib`, or a comma-separated list of files, folders and globs.
      own: folders that this run writes, which are left out of the folder that they are in.
      reading: takes counts of what is left out of folders.
      name: of the source, for errors.

    Raises:
      UserError: a path does not exist or is no file, a glob matches nothing, or a folder holds
        nothing to read or is one that this program writes.
    """
    if source == "stdlib":
        root = epath.Path(sysconfig.get_paths()["stdlib"])
        walk = _Walk((), Reading(), STDLIB_EXCLUDED)
        files = (path for path in walk.below(root) if path.suffix == ".py")
        return sorted(files, key=lambda path: path.parts)
    reading = Reading() if reading is None else reading
    walk = _Walk(own, reading)
    found: set[str] = set()
    items = [source] if _exists(epath.Path(source).expanduser()) else _split(source)
    for pattern in filter(None, items):
        path = epath.Path(pattern).expanduser()
        if _exists(path):
            matches = walk.root(path) if path.is_dir() else [_file(path)]
        elif _WILDCARD.search(str(path)):
            matches = _matches(path, pattern, reading)
        else:
            raise UserError(f"data.source: {pattern} does not exist{_how_to_name(pattern, name)}")
        found.update(str(match) for match in matches)
    return _once([epath.Path(match) for match in sorted(found)], reading)


def _exists(path: epath.Path) -> bool:
    try:
        return bool(path.exists())
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _how_to_name(pattern: str, name: str) -> str:
    if pattern == "stdlib" or pattern.startswith("tfds:"):
        return f" as a file; write it as a source of its own, such as code=files; more={pattern}"
    if name:
        return f" (a path that has '=' in it is written ./{name}={pattern})"
    return ""


def _file(path: epath.Path) -> epath.Path:
    """A path that was named itself.

    Raises:
      UserError: it is a pipe or a device.
    """
    if not _is_file(path):
        raise UserError(
            f"data.source: {path} is a pipe or a device, not a file; a source is read more than "
            "once, so write it to a file first"
        )
    return path


def _is_file(path: epath.Path) -> bool:
    # `epath` takes all that is no folder for a file.
    return bool(path.is_file()) if is_object_store(path) else os.path.isfile(path)


def _matches(path: epath.Path, pattern: str, reading: Reading) -> list[epath.Path]:
    """The files that a glob matches.

    Raises:
      UserError: none does.
    """
    if "**" in str(path):  # in a bucket it could list for hours
        raise UserError(
            f"data.source: {pattern} has '**'; name the folder, which is read with all "
            "that is below it"
        )
    matches, hidden = _glob(path)
    folders = [match for match in matches if match.is_dir()]
    files = [match for match in matches if match not in set(folders) and _is_file(match)]
    for reason, places in ((HIDDEN, hidden), (FOLDERS, folders)):
        for place in places:
            reading.leave_out(reason, str(place))
    for place in set(matches) - set(folders) - set(files):
        reading.leave_out(DEAD if os.path.islink(place) else SPECIAL, str(place))
    if not files:
        what = "only folders, whose names are read with all that is below them" if folders else ""
        what = what or ("only hidden files" if hidden else "no file")
        raise UserError(f"data.source: {pattern} matches {what}")
    return files


def _glob(path: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
    """What a pattern matches, and what it would match if hidden names were no exception."""
    if is_object_store(path):
        return list(path.parent.glob(path.name)), []
    # Folders at the beginning may have brackets in their names.
    parts = path.parts
    root, rest = "", list(parts)
    while len(rest) > 1 and os.path.isdir(os.path.join(root, rest[0])):
        root = os.path.join(root, rest.pop(0))
    pattern = os.path.join(glob.escape(root), *rest)
    matches = sorted(glob.glob(pattern))
    hidden = set(glob.glob(pattern, include_hidden=True)) - set(matches)
    return [epath.Path(name) for name in matches], [epath.Path(name) for name in sorted(hidden)]


def _once(paths: list[epath.Path], reading: Reading) -> list[epath.Path]:
    """The files without those that are links to others of them."""
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
                reading.leave_out(TWICE, str(path))
            else:
                kept.append(path)
            seen.add(real)
    return sorted(kept, key=str)


@dataclasses.dataclass(frozen=True)
class _Entry:
    path: epath.Path
    kind: str  # `folder`, `file`, or why it is left out


class _Walk:
    """Reads folders, each once, however many links lead to it."""

    def __init__(
        self, own: Sequence[epath.PathLike], reading: Reading, excluded: tuple[str, ...] = ()
    ) -> None:
        self._own = {_real(folder) for folder in own}
        self._reading, self._excluded = reading, excluded
        self._seen: set[str] = set()

    def root(self, folder: epath.Path) -> list[epath.Path]:
        """The files below a folder that is named itself.

        Raises:
          UserError: there are none, or the folder is one that this program writes.
        """
        entries = _entries(folder)
        kind = _own_kind({entry.path.name for entry in entries})
        if _real(folder) in self._own:
            kind = "the folder that this run writes to"
        if kind:
            raise UserError(
                f"data.source: {folder} is {kind}; name the folder or the files of text"
                + ("; token shards are read by data.path" if "shards" in kind else "")
            )
        if _real(folder) in self._seen:
            return []  # named twice
        before = self._reading.left_out[HIDDEN]
        files = list(self.below(folder))
        about = [path for path in files if _ABOUT.fullmatch(path.name)]
        if len(about) < len(files):
            for path in about:
                self._reading.leave_out(ABOUT, str(path))
            files = [path for path in files if path not in set(about)]
        if not files:
            hidden = self._reading.left_out[HIDDEN] > before
            more = " but hidden ones" if hidden else " to read" if entries else ""
            raise UserError(f"data.source: the folder {folder} holds no file{more}")
        return files

    def below(self, folder: epath.Path) -> Iterator[epath.Path]:
        """All files below a folder but what is left out of it; in no order."""
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            real = _real(folder)
            if real in self._seen:
                self._reading.leave_out(TWICE, str(folder))
                continue
            self._seen.add(real)
            entries = _entries(folder)
            if self._is_own(real, {entry.path.name for entry in entries}):
                self._reading.leave_out(OWN, str(folder))
                continue
            for entry in entries:
                name = entry.path.name
                if name in self._excluded:
                    continue
                if name.startswith("."):
                    self._reading.leave_out(HIDDEN, str(entry.path))
                elif entry.kind == "folder" and name in _ABOUT_FOLDERS:
                    self._reading.leave_out(ABOUT, str(entry.path))
                elif entry.kind == "folder":
                    waiting.append(entry.path)
                elif entry.kind == "file":
                    yield entry.path
                else:
                    self._reading.leave_out(entry.kind, str(entry.path))

    def _is_own(self, real: str, names: set[str]) -> bool:
        return real in self._own or bool(_own_kind(names))


def _real(folder: epath.PathLike) -> str:
    return os.fspath(folder) if is_object_store(folder) else os.path.realpath(folder)


def _own_kind(names: set[str]) -> str:
    """What kind of folder of this program holds these names; empty: none."""
    if {"manifest.json", "plan.json"} & names and any(map(_SHARD.fullmatch, names)):
        return "a folder of token shards"
    visible = {name for name in names if not _PASSING.match(name)}
    if "plan.json" in names and visible <= {"plan.json", "tokenizer.model", "chat_template.json"}:
        return "a folder of token shards"
    if "config.json" in names and names.intersection(_RUN):
        return "the work directory of a run"
    if "goodput.json" in names and visible <= {"data", *_RUN}:  # it is preparing its data
        return "the work directory of a run"
    return ""


def _entries(folder: epath.Path) -> list[_Entry]:
    """What is in a folder, sorted.

    Raises:
      UserError: it cannot be read.
    """
    try:
        if is_object_store(folder):
            paths = sorted(folder.iterdir(), key=str)
            with ThreadPoolExecutor(THREADS) as pool:
                folders = pool.map(lambda path: path.is_dir(), paths)
                return [
                    _Entry(path, "folder" if is_dir else "file")
                    for path, is_dir in zip(paths, folders, strict=True)
                ]
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        return [_Entry(folder / entry.name, _kind_of(entry)) for entry in found]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from error


def _kind_of(entry: os.DirEntry[str]) -> str:
    try:
        mode = entry.stat().st_mode
    except OSError:
        if entry.is_symlink():
            return DEAD
        raise
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else SPECIAL
