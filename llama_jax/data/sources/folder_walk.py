"""The files below a folder, without those that are not text of the user."""

import dataclasses
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from llama_jax.data.sources.part import Tally
from llama_jax.errors import UserError
from llama_jax.files import is_object_store

THREADS = 32  # requests about files that run at the same time: buckets have a high latency
HIDDEN = "hidden files and folders"
ABOUT = "files about the data, such as README, LICENSE and checksums"
OWN = "folders that llama_jax writes: token shards and runs"
SPECIAL = "pipes, sockets and devices"
DEAD = "broken links"
TWICE = "links to files or folders that are read under another name"
_ABOUT = re.compile(
    r"((readme|licen[cs]e)([-_. ][-\w().]{1,16})?"
    r"|(copying|notice|citation|dataset_?card|data_?card|datasheet|unlicen[cs]e|code_of_conduct)"
    r"([-_.][a-z]{2,10})?)(\.(md|txt|rst|html?|cff|bib|pdf))?"
    r"|(dataset_infos?|dataset_dict|state|croissant)\.json"
    r"|_(success|metadata|common_metadata|started_\w+|committed_\w+)|thumbs\.db|desktop\.ini"
    r"|((md5|sha\d+)sums?|checksums?)(\.\w+)?"
    r"|.*(\.(lock|incomplete|crdownload|tmp|swp|md5|sha1|sha256|sha512|crc|asc|sig)|~)",
    re.IGNORECASE | re.DOTALL,
)
_ABOUT_FOLDERS = ("__pycache__", "__MACOSX", "_temporary", "_delta_log", "lost+found")
# Folders that llama_jax wrote are recognised by the names of their files.
_SHARD = re.compile(r"(train|validation)-\d+-\d+\.\w+|part-\d+\.json")
_INDEX = re.compile(r"(train|validation)-\d{5}-\d{3,}\.idx")
_PASSING = re.compile(r"\.|lost\+found$|.*\.tmp-\d+$")  # these names may occur in any folder
_RUN = ("checkpoints", "metrics.jsonl", "goodput.json")


@dataclasses.dataclass(frozen=True)
class _Entry:
    path: epath.Path
    kind: str  # `folder`, `file`, or the reason why it is left out


class Walk:
    """A walk through folders. Visits each folder once, even if several links lead to it."""

    def __init__(
        self, own: Sequence[epath.PathLike], tally: Tally, excluded: tuple[str, ...] = ()
    ) -> None:
        self._own = {_real(folder) for folder in own}
        self._tally, self._excluded = tally, excluded
        self._seen: set[str] = set()

    def files_of_root(self, folder: epath.Path) -> list[epath.Path]:
        """Returns the files below a folder that the user named; empty if it was read before.

        Raises:
          UserError: the folder holds no file to read, cannot be read, or was written by llama_jax.
        """
        entries = _entries(folder)
        kind = _own_kind({entry.path.name for entry in entries})
        if _real(folder) in self._own:
            kind = "the folder that this run writes to"
        if kind:
            raise UserError(
                f"data.source: {folder} is {kind}; name the folder or the files that hold the text"
                + ("; to read token shards, set data.path" if "shards" in kind else "")
            )
        if _real(folder) in self._seen:
            return []  # the user named it twice
        before = self._tally.left_out[HIDDEN]
        files = list(self.files_below(folder))
        about = [path for path in files if _ABOUT.fullmatch(path.name)]
        if len(about) < len(files):
            for path in about:
                self._tally.leave_out(ABOUT, str(path))
            files = [path for path in files if not _ABOUT.fullmatch(path.name)]
        if not files:
            hidden = self._tally.left_out[HIDDEN] > before
            more = " except hidden ones" if hidden else " to read" if entries else ""
            raise UserError(f"data.source: the folder {folder} holds no file{more}")
        return files

    def files_below(self, folder: epath.Path) -> Iterator[epath.Path]:
        """Yields the files below a folder, in no order, and counts what it leaves out."""
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            real = _real(folder)
            if real in self._seen:
                self._tally.leave_out(TWICE, str(folder))
                continue
            self._seen.add(real)
            entries = _entries(folder)
            if self._is_own(real, {entry.path.name for entry in entries}):
                if entries:  # this run has just made an empty folder: do not report it
                    self._tally.leave_out(OWN, str(folder))
                continue
            for entry in entries:
                name = entry.path.name
                if name in self._excluded:
                    continue
                if name.startswith("."):
                    self._tally.leave_out(HIDDEN, str(entry.path))
                elif entry.kind == "folder" and name in _ABOUT_FOLDERS:
                    self._tally.leave_out(ABOUT, str(entry.path))
                elif entry.kind == "folder":
                    waiting.append(entry.path)
                elif entry.kind == "file":
                    yield entry.path
                else:
                    self._tally.leave_out(entry.kind, str(entry.path))

    def _is_own(self, real: str, names: set[str]) -> bool:
        return real in self._own or bool(_own_kind(names))


def _real(folder: epath.PathLike) -> str:
    return os.fspath(folder) if is_object_store(folder) else os.path.realpath(folder)


def _own_kind(names: set[str]) -> str:
    """Returns the kind of folder of llama_jax that holds these names; empty: not such a folder."""
    if {"manifest.json", "plan.json"} & names and any(map(_SHARD.fullmatch, names)):
        return "a folder of token shards"
    visible = {name for name in names if not _PASSING.match(name)}
    if any(map(_INDEX.fullmatch, names)):  # shards without their manifest
        return "a folder of token shards"
    if "plan.json" in names and visible <= {"plan.json", "tokenizer.model", "chat_template.json"}:
        return "a folder of token shards"
    if "config.json" in names and names.intersection(_RUN):
        return "the work directory of a run"
    if "goodput.json" in names and visible <= {"data", *_RUN}:  # the run still prepares its data
        return "the work directory of a run"
    return ""


def _entries(folder: epath.Path) -> list[_Entry]:
    """Returns the entries of a folder, sorted by name.

    Raises:
      UserError: the folder cannot be read.
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
