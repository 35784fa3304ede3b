"""The folders of saved steps: which there are, which are kept, and what becomes of the others.

A folder whose name is a number is a complete step. Everything on its way in or out has another
name (`8.saving`, `8.deleting`), and is removed at the next start; a damaged step is set aside as
`8.damaged` and left to the user. Whatever else lies there is not touched.

A step may be a link to a folder on another disk. The link is then what is renamed or removed, never
the folder that it names.
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
# int() reads more, such as digits of other scripts; a step is below 10**18.
_STEP = re.compile("0|[1-9][0-9]{0,17}")
# No longer names: those a user has given, such as `8.saving-copy`. Orbax adds a number to its own.
_UNFINISHED = re.compile(
    r"[0-9]+\.(saving(\.probe)?|deleting(\.[0-9]+)?|(saving\.)?orbax-checkpoint-tmp(-[0-9]+)?)"
)


def saved_steps(directory: epath.Path) -> list[int]:
    """Numbers of the complete steps, in order; none where there is no such directory.

    A step may be a link, also to where nothing is at present; a file is none, whatever its name. In
    an object store a folder has its number from the start: its manifest makes it complete.
    """
    entries = _numbered(directory)
    if is_object_store(directory):
        entries = [entry for entry in entries if (entry / MANIFEST).exists()]
    return sorted(int(entry.name) for entry in entries if not _is_file(entry))


def files_named_like_steps(directory: epath.Path) -> list[str]:
    """Names of files that have the name of a step, but are none."""
    return sorted(entry.name for entry in _numbered(directory) if _is_file(entry))


def _numbered(directory: epath.Path) -> list[epath.Path]:
    if not directory.is_dir():
        return []
    return [entry for entry in directory.iterdir() if _STEP.fullmatch(entry.name)]


def _is_file(entry: epath.Path) -> bool:
    """Whether it is a file, or a pipe or the like; a link to nothing is none."""
    return not is_object_store(entry) and os.path.exists(entry) and not os.path.isdir(entry)


def _described(directory: epath.Path, step: int, name: str) -> Any:
    """What a step says about itself; None where it cannot."""
    try:
        return manifest.read_description(directory / str(step))[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _best(directory: epath.Path, steps: list[int], count: int) -> list[int]:
    """The steps with the lowest validation loss, of equal ones the newer; all if they are few."""
    if len(steps) <= count:
        return steps
    losses = {step: _described(directory, step, "eval_loss") for step in steps}
    usable = [s for s, loss in losses.items() if isinstance(loss, float) and math.isfinite(loss)]
    return sorted(usable, key=lambda step: losses[step], reverse=True)[-count:]


def _rewinds(directory: epath.Path, step: int) -> list[list[int]]:
    """The rewinds that led to a step, as far as it can say."""
    rewinds = _described(directory, step, "rewinds")
    pairs = rewinds if isinstance(rewinds, list) else []
    return [p for p in pairs if isinstance(p, list) and [type(each) for each in p] == [int, int]]


def dispensable_steps(directory: epath.Path, train: TrainConfig) -> list[int]:
    """Steps that no rule keeps: the newest, every n-th, the best, those that a rewind may need.

    The newest is always among the kept, so that one good step stays whatever the config.
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
    """Whether a saved step is one that the run comes by, however often it is stopped and started.

    Those are multiples of `train.checkpoint_every`, and what was saved after a rewind; but not what
    a rewind left behind: the run's weights do not come from there.

    Args:
      step: the saved one.
      train: of the run.
      rewinds: so far, each as [step at which, checkpoint to which].
    """
    left = any(to < step < at for at, to in rewinds)
    return not left and (step % train.checkpoint_every == 0 or step in (at for at, _ in rewinds))


def _needed_to_rewind(steps: list[int], train: TrainConfig, rewinds: list[list[int]]) -> list[int]:
    """Those to which a run may go back that has come to the newest of `steps`."""
    fit = [step for step in steps if can_rewind_to(step, train, rewinds)]
    # A bad stretch may have begun before the newest: so much longer, and it had been seen.
    first = steps[-1] - train.max_skipped - train.log_every
    older = [step for step in fit if step <= first - train.rewind_steps]
    return older[-1:] + [step for step in fit if step > first - train.rewind_steps]


def remove(folder: epath.Path) -> list[str]:
    """Deletes a step; killed on the way, it leaves nothing that looks like one.

    Of links, be it the step itself or something in it, only the link is deleted.

    Returns:
      What is left: where those links lead.

    Raises:
      OSError: it cannot be deleted.
    """
    if is_object_store(folder):
        (folder / MANIFEST).unlink()
        folder.rmtree()
        return []
    left = [os.path.realpath(link) for link in _links(folder)]
    _delete(_move(folder, _DELETING))
    return left


def _links(path: epath.Path) -> list[str]:
    """The links at and below a path."""
    if os.path.islink(path):
        return [os.fspath(path)]
    inside = (
        os.path.join(place, name)
        for place, folders, files in os.walk(path)
        for name in (*folders, *files)
    )
    return [entry for entry in inside if os.path.islink(entry)]


def _delete(path: epath.Path) -> None:
    """Deletes a file, a link, or a folder with all that is in it; links in it are not followed."""
    if os.path.islink(path) or _is_file(path):
        os.unlink(path)
    else:
        path.rmtree(missing_ok=True)


def _move(path: epath.Path, ending: str) -> epath.Path:
    """Renames a step to the first name with this ending that is free; returns the new path."""
    for number in range(10_000):
        target = path.parent / f"{path.name}{ending}{f'.{number}' if number else ''}"
        if not target.exists() and not os.path.islink(target):
            break
    return path.rename(target)


def set_aside(folder: epath.Path) -> epath.Path:
    """Gives a damaged step a name that says so; returns the new path."""
    return _move(folder, _DAMAGED)


def rename_to_final(saved: epath.Path, folder: epath.Path) -> epath.Path | None:
    """Gives a step that is saved its final name.

    Returns:
      Where that is now which had this name and is no step, such as a file; None if nothing had it.
    """
    in_the_way = os.path.lexists(folder) and not os.path.isdir(folder)
    aside = set_aside(folder) if in_the_way else None
    saved.rename(folder)
    return aside


def remove_leftovers(directory: epath.Path, warn: Callable[[str], None] | None = None) -> list[str]:
    """Removes what unfinished saves and deletions left; returns the names.

    Args:
      directory: of the steps.
      warn: is given a line for each that cannot be removed; it stays.
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
