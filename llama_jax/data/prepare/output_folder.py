"""A folder of shards while it is written: its checks, its lock, its plan and its completion.

Shards are written directly into the target, because a volume, a link or an existing folder cannot
be replaced by another folder at the end. `plan.json` is written first and describes the work. The
report of a part (`part-00000.json`) shows that the part is done. The manifest is written last and
completes the folder. After that the reports and the plan are removed, the plan last.
"""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from llama_jax.config import Config
from llama_jax.data.prepare.workers import parts_done
from llama_jax.data.shards.layout import (
    MANIFEST,
    PLAN,
    TEMPLATE,
    TOKENIZER,
    encode_manifest,
    token_dtype,
)
from llama_jax.data.sources.part import Part
from llama_jax.errors import UserError, as_user_error
from llama_jax.files import is_object_store, locked, read_json, write_atomically

# The files that `prepare` writes, and the temporary files that a killed `write_atomically` leaves.
_OURS = re.compile(
    r"((?P<shard>(train|validation)-\d+-\d+)\.\w+(\.json)?|part-\d+\.json"
    rf"|{re.escape(PLAN)}|{re.escape(MANIFEST)}|{re.escape(TOKENIZER)}|{re.escape(TEMPLATE)})"
    r"(?P<torn>\.tmp-.+)?"
)
# The folders of an empty volume, besides hidden files.
_OF_VOLUMES = ("lost+found", "System Volume Information", "$RECYCLE.BIN")
_COMPRESSED = (".gz", ".zst", ".xz", ".bz2", ".parquet")
_COMPRESSION = 3  # approximate compression ratio of text
_BYTES_PER_TOKEN = 4  # approximate bytes of text per token

Log = Callable[[str], None]


def is_complete(folder: epath.Path) -> bool:
    """Returns whether a folder has its manifest."""
    return (folder / MANIFEST).exists()


def is_tidy(folder: epath.Path) -> bool:
    """Returns whether a folder is complete, and no file of the unfinished work is left."""
    return is_complete(folder) and not (folder / PLAN).exists()


@contextlib.contextmanager
def locked_folders(output: epath.Path, names: list[str]) -> Iterator[None]:
    """Makes and locks the folders of all sources; removes at the end those that are still empty.

    Args:
      output: the folder that contains all others.
      names: the names of the sources, which are also their folders; "": the only source, in
        `output` itself.

    Raises:
      UserError: a folder cannot be made or written, contains files that are not shards, or is
        locked by another process.
    """
    folders = list(dict.fromkeys([output, *(output / name for name in names)]))
    for folder in folders:
        _check_place(folder)
    with contextlib.ExitStack() as stack:
        for folder in folders:
            missing = _missing(folder)
            with system_errors(folder):
                stack.enter_context(
                    locked(
                        folder,
                        f"another process prepares shards in {folder}; wait until it ends, or "
                        "choose another folder",
                    )
                )
            stack.callback(_remove_empty, missing)
        _check_contents(output, names)
        yield


def _check_place(folder: epath.Path) -> None:
    """Checks that a folder exists or can be made.

    Raises:
      UserError: the path or one of its parents is a file or a broken link.
    """
    if is_object_store(folder):
        return
    path = pathlib.Path(folder)
    with system_errors(folder):
        for place in (path.absolute(), *path.absolute().parents):
            if place.is_dir():
                return
            if place.exists():
                what = "it" if place == path.absolute() else str(place)
                raise UserError(f"{folder} cannot be a folder of shards: {what} is a file")
            if place.is_symlink():
                raise UserError(
                    f"{folder} cannot be a folder of shards: {place} is a link to "
                    f"{os.readlink(place)}, which does not exist; make that folder first"
                )


def _check_contents(output: epath.Path, names: list[str]) -> None:
    """Checks that the folders hold shards, unfinished work or nothing, and are writable.

    Raises:
      UserError: a folder holds other files, or is not writable.
    """
    if "" not in names:
        for name in (MANIFEST, PLAN):
            if (output / name).exists():
                raise UserError(
                    f"{output} holds the shards of one source without a name; choose another "
                    "folder for sources with names"
                )
    for name in names:
        folder = output / name
        if is_complete(folder):
            continue
        with system_errors(folder):
            if not (folder / PLAN).exists() and (other := _foreign(folder)):
                raise UserError(
                    f"{folder} is not empty and holds no token shards, but {other}; choose another "
                    "folder"
                )
            if not is_object_store(folder):
                tempfile.TemporaryFile(dir=folder).close()


def _foreign(folder: epath.Path) -> str:
    """Returns the first foreign name in a folder: of neither an empty volume nor a killed write."""
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    for name in names:
        if not name.startswith((".", f"{PLAN}.tmp-")) and name not in _OF_VOLUMES:
            return name
    return ""


def _missing(folder: epath.Path) -> list[pathlib.Path]:
    """Returns those of the folder and its parents that do not exist, the folder first."""
    if is_object_store(folder):
        return []
    path = pathlib.Path(folder)
    return [place for place in (path, *path.parents) if not place.exists()]


def _remove_empty(folders: list[pathlib.Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def system_errors(place: epath.Path) -> Iterator[None]:
    """Turns an OSError into a `UserError` that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: cannot write {place}; free some space and run the same command "
                "again, it continues where it stopped"
            ) from error
        raise UserError(f"cannot write {place}: {error.strerror or error}") from error


def begin(
    folder: epath.Path,
    settings: dict[str, Any],
    parts: list[Part],
    config: Config,
    restart: bool,
    log: Log,
) -> None:
    """Writes the plan of the work in a folder, or checks that an existing plan is the same.

    If an existing plan differs but none of its parts is done, the old work is deleted.

    Args:
      folder: the folder of the shards.
      settings: the settings that the shards depend on.
      parts: the parts of the source.
      config: sets the sizes of shards and parts.
      restart: delete unfinished work, and begin again.
      log: receives lines for the user.

    Raises:
      UserError: an existing plan differs and has finished parts, or it cannot be read.
    """
    plan = {
        "settings": settings,
        "shard_tokens": config.data.shard_tokens,
        "part_bytes": config.data.part_bytes,
        "parts": [dataclasses.asdict(part) for part in parts],
    }
    folder.mkdir(parents=True, exist_ok=True)  # the lock does not make it on a bucket
    path = folder / PLAN
    done = len(list(folder.glob("part-*.json")))
    if path.exists() and restart:
        clear(folder)
        log(f"the unfinished work in {folder} is deleted")
    elif path.exists():
        mend = f"delete it (llama_jax.prepare --output={folder} --restart does)"
        try:
            with as_user_error(f"{path}"):
                changed = _changes(read_json(path), json.loads(json.dumps(plan)))
        except UserError as error:
            raise UserError(f"cannot go on in {folder}: {error}; {mend}") from error
        if not changed:
            log(f"going on in {folder}: {done} of {len(parts)} parts are done")
            finished = parts_done(folder, len(parts))
            todo = [part for part, is_done in zip(parts, finished, strict=True) if not is_done]
            _warn_of_space(folder, todo, settings["vocab_size"], log)
            return
        if done:
            raise UserError(
                f"{folder} holds unfinished work ({done} parts are done) with another "
                f"{', '.join(changed)}; set the old value again to go on with it, or {mend}"
            )
        clear(folder)
        log(
            f"no part of the work begun in {folder} was done; beginning again with the new settings"
        )
    before = folder.parent / f"{folder.name}.partial"
    if before.is_dir():
        log(
            f"warning: {before} holds unfinished work of an earlier version, which this one "
            "cannot use; delete it if you don't need it"
        )
    write_atomically(path, json.dumps(plan).encode())
    _warn_of_space(folder, parts, settings["vocab_size"], log)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the differences between two plans, each with its old and new value."""
    changed = changes(old["settings"], new["settings"])
    changed += changes(*({"shard_tokens": plan["shard_tokens"]} for plan in (old, new)))
    if not changed and old["parts"] != new["parts"]:  # the parts depend on all other settings
        changed = changes(*({"part_bytes": plan["part_bytes"]} for plan in (old, new)))
        changed = changed or ["list of files, or their sizes"]
    return changed


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns the settings that differ, as `name (was 1, is 2)`; for checksums only the name."""
    differences = []
    for name in {**old, **new}:
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if any(
            isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in (was, now)
        ):
            differences.append(name)
        else:
            differences.append(f"{name} (was {_shown(was)}, is {_shown(now)})")
    return differences


def _shown(value: Any) -> str:
    return "not set" if value is None else repr(value)


def complete(folder: epath.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, and removes the files that only unfinished work needs."""
    write_atomically(folder / MANIFEST, encode_manifest(manifest))
    tidy(folder, manifest)


def tidy(folder: epath.Path, manifest: dict[str, Any]) -> None:
    """Removes our files that a complete folder does not need, the plan last."""
    if is_tidy(folder):
        return
    shards = {shard["name"] for split in manifest["splits"].values() for shard in split["shards"]}
    for path, match in _our_files(folder):
        kept = match["shard"] in shards or path.name in (MANIFEST, TOKENIZER, TEMPLATE)
        if path.name != PLAN and (match["torn"] or not kept):
            path.unlink()
    (folder / PLAN).unlink(missing_ok=True)


def abandon(folder: epath.Path, n_parts: int) -> None:
    """Removes work that has failed, unless a part is done, which the next attempt can use."""
    if not is_complete(folder) and not any(parts_done(folder, n_parts)):
        clear(folder)


def clear(folder: epath.Path) -> None:
    """Removes unfinished work and no other files; the plan last, since it marks such work."""
    for path, _ in _our_files(folder):
        if path.name != PLAN:
            path.unlink()
    (folder / PLAN).unlink(missing_ok=True)


def _our_files(folder: epath.Path) -> list[tuple[epath.Path, re.Match[str]]]:
    found = ((path, _OURS.fullmatch(path.name)) for path in list(folder.iterdir()))
    return [(path, match) for path, match in found if match]


def _warn_of_space(folder: epath.Path, parts: list[Part], vocab_size: int, log: Log) -> None:
    """Warns if a disk has less free space than the shards of the parts will take, by an estimate.

    This is no error: how much of a file is text is unknown before it is read, and finished parts
    are kept when the disk is full.
    """
    if is_object_store(folder):
        return
    text = sum(
        part.size * (_COMPRESSION if part.paths[0].endswith(_COMPRESSED) else 1) for part in parts
    )
    needed = text / _BYTES_PER_TOKEN * token_dtype(vocab_size).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        log(
            f"warning: the shards may take about {needed / 1e9:,.2f} GB, and {folder} has "
            f"{free / 1e9:,.2f} GB free; if the disk gets full, free some space and run the same "
            "command again, it continues where it stopped"
        )
