"""The folders of saved steps: which exist, which are kept, and how the others are removed.

A folder whose name is a number is a complete step. While a step is written or deleted, its folder
has another name (`8.saving`, `8.deleting`); the next start removes such leftovers. A damaged step
is renamed to `8.damaged` and left to the user. Other files and folders are not touched.

A step may be a link to a folder on another disk. Then the link is renamed or removed, never the
folder that it points to.
"""

import math
import os
import re
from collections.abc import Callable
from typing import Any

from etils import epath

from llama_jax.checkpoint import manifest
from llama_jax.config import TrainConfig
from llama_jax.errors import first_line
from llama_jax.files import is_object_store
from llama_jax.text.saved_tokenizer import MANIFEST

SAVING = ".saving"
_DELETING = ".deleting"
_DAMAGED = ".damaged"
# int() accepts more, such as digits of other scripts. A step is below 10**18.
_STEP = re.compile("0|[1-9][0-9]{0,17}")
# Longer names do not match: a user chose them, such as `8.saving-copy`. Orbax adds numbers to its
# own names.
_UNFINISHED = re.compile(
    r"[0-9]+\.(saving(\.probe)?|deleting(\.[0-9]+)?|(saving\.)?orbax-checkpoint-tmp(-[0-9]+)?)"
)


def saved_steps(directory: epath.Path) -> list[int]:
    """Returns the numbers of the complete steps, in ascending order; [] without the directory.

    A step may be a link, even if its target does not exist at present. A file is never a step,
    whatever its name. In an object store a folder has its number from the start, and only its
    manifest makes it complete.
    """
    entries = _numbered(directory)
    if is_object_store(directory):
        entries = [entry for entry in entries if (entry / MANIFEST).exists()]
    return sorted(int(entry.name) for entry in entries if not _is_file(entry))


def files_named_like_steps(directory: epath.Path) -> list[str]:
    """Returns the names of files that are named like a step but are not folders."""
    return sorted(entry.name for entry in _numbered(directory) if _is_file(entry))


def _numbered(directory: epath.Path) -> list[epath.Path]:
    if not directory.is_dir():
        return []
    return [entry for entry in directory.iterdir() if _STEP.fullmatch(entry.name)]


def _is_file(entry: epath.Path) -> bool:
    """Returns whether `entry` is a file, a pipe or the like; False for a broken link."""
    return not is_object_store(entry) and os.path.exists(entry) and not os.path.isdir(entry)


def _described(directory: epath.Path, step: int, name: str) -> Any:
    """Returns field `name` of the description of a step; None if it cannot be read."""
    try:
        return manifest.read_description(directory / str(step))[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _best(directory: epath.Path, steps: list[int], count: int) -> list[int]:
    """Returns the `count` steps with the lowest validation loss; of equal ones, the newer."""
    if len(steps) <= count:
        return steps
    losses = {step: _described(directory, step, "eval_loss") for step in steps}
    usable = [s for s, loss in losses.items() if isinstance(loss, float) and math.isfinite(loss)]
    return sorted(usable, key=lambda step: losses[step], reverse=True)[-count:]


def _rewinds(directory: epath.Path, step: int) -> list[list[int]]:
    """Returns the rewinds that led to a step, as far as its description can be read."""
    rewinds = _described(directory, step, "rewinds")
    pairs = rewinds if isinstance(rewinds, list) else []
    return [p for p in pairs if isinstance(p, list) and [type(each) for each in p] == [int, int]]


def dispensable_steps(directory: epath.Path, train: TrainConfig) -> list[int]:
    """Returns the steps that no rule keeps.

    The rules keep the newest steps, every n-th, those with the lowest validation loss, and those
    that a rewind may need. The newest step is kept under any config, so that one always remains.
    """
    steps = saved_steps(directory)
    kept = set(steps[-train.keep_checkpoints :])
    if train.keep_every:
        kept |= {step for step in steps if step % train.keep_every == 0}
    if train.keep_best:
        kept |= {*_best(directory, steps, train.keep_best)}
    if steps and train.max_rewinds:
        kept |= {*_needed_to_rewind(steps, train, _rewinds(directory, steps[-1]))}
    return [step for step in steps if step not in kept]


def can_rewind_to(step: int, train: TrainConfig, rewinds: list[list[int]]) -> bool:
    """Returns whether the run would have saved this step even if it had never been interrupted.

    It saves multiples of `train.checkpoint_every`, and the step of each rewind, with the restored
    weights. Steps that a rewind has undone do not count: the present weights do not descend from
    them.

    Args:
      step: a saved step.
      train: config of the run.
      rewinds: rewinds so far, each as [step at which it happened, checkpoint to which it returned].
    """
    left = any(to < step < at for at, to in rewinds)
    return not left and (step % train.checkpoint_every == 0 or step in (at for at, _ in rewinds))


def _needed_to_rewind(steps: list[int], train: TrainConfig, rewinds: list[list[int]]) -> list[int]:
    """Returns the steps that a run at the newest of `steps` may have to rewind to."""
    fit = [step for step in steps if can_rewind_to(step, train, rewinds)]
    # Bad batches may have begun before the newest step, but not earlier than `first`: the run would
    # have detected earlier ones already.
    first = steps[-1] - train.max_skipped - train.log_every
    older = [step for step in fit if step <= first - train.rewind_steps]
    return older[-1:] + [step for step in fit if step > first - train.rewind_steps]


def remove(folder: epath.Path) -> list[str]:
    """Deletes a step; after a kill, no folder is left that looks like a step.

    If the step or something in it is a link, only the link is deleted, not its target.

    Returns:
      The targets of these links, which are not deleted.

    Raises:
      OSError: the step cannot be deleted.
    """
    if is_object_store(folder):
        (folder / MANIFEST).unlink()
        folder.rmtree()
        return []
    left = [os.path.realpath(link) for link in _links(folder)]
    _delete(_move(folder, _DELETING))
    return left


def _links(path: epath.Path) -> list[str]:
    """Returns the links at and below a path."""
    if os.path.islink(path):
        return [os.fspath(path)]
    inside = (
        os.path.join(place, name)
        for place, folders, files in os.walk(path)
        for name in (*folders, *files)
    )
    return [entry for entry in inside if os.path.islink(entry)]


def _delete(path: epath.Path) -> None:
    """Deletes a file, a link, or a folder and its content; does not follow links."""
    if os.path.islink(path) or _is_file(path):
        os.unlink(path)
    else:
        path.rmtree(missing_ok=True)


def _move(path: epath.Path, ending: str) -> epath.Path:
    """Renames a step to the first free name with this ending; returns the new path."""
    for number in range(10_000):
        target = path.parent / f"{path.name}{ending}{f'.{number}' if number else ''}"
        if not target.exists() and not os.path.islink(target):
            break
    return path.rename(target)


def set_aside(folder: epath.Path) -> epath.Path:
    """Renames a damaged step to `8.damaged` or the like; returns the new path."""
    return _move(folder, _DAMAGED)


def rename_to_final(saved: epath.Path, folder: epath.Path) -> epath.Path | None:
    """Gives a saved step its final name.

    Returns:
      The new path of a file (or similar) that had this name and was renamed; None if none had it.
    """
    in_the_way = os.path.lexists(folder) and not os.path.isdir(folder)
    aside = set_aside(folder) if in_the_way else None
    saved.rename(folder)
    return aside


def remove_leftovers(directory: epath.Path, warn: Callable[[str], None] | None = None) -> list[str]:
    """Removes the leftovers of unfinished saves and deletions; returns their names.

    Args:
      directory: folder of the steps.
      warn: called with one line for each leftover that cannot be removed.
    """
    found = [entry for entry in directory.iterdir() if _UNFINISHED.fullmatch(entry.name)]
    removed = []
    for entry in sorted(found, key=lambda entry: entry.name):
        try:
            _delete(entry)
            removed.append(entry.name)
        except OSError as error:
            if warn:
                warn(f"warning: {entry} is left over, and cannot be removed: {first_line(error)}")
    return removed
