"""The folders of saved steps: which there are, which are kept, and what becomes of the others.

A folder whose name is a number is a complete step. Everything on its way in or out has another
name (`8.saving`, `8.deleting`), and is removed at the next start; a damaged step is set aside as
`8.damaged` and left to the user.
"""

import dataclasses
import datetime
import math
import re

from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from llama_jax import manifest
from llama_jax.config import TrainConfig

SAVING = ".saving"
_DELETING = ".deleting"
_DAMAGED = ".damaged"
_UNFINISHED = re.compile(r"\d+(\.saving|\.deleting|\.orbax-checkpoint-tmp).*")


@dataclasses.dataclass(frozen=True)
class SavedStep:
    """What orbax's policies ask about a step."""

    step: int
    metrics: dict[str, float] | None
    time: datetime.datetime = datetime.datetime.min


def saved_steps(directory: epath.Path) -> list[int]:
    """Numbers of the complete steps, in order; none where there is no such directory."""
    if not directory.exists():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit())


def _saved_step(directory: epath.Path, step: int) -> SavedStep:
    """The step with its validation loss, where it has one that can be compared."""
    try:
        loss = manifest.described(directory / str(step))["eval_loss"]
    except (OSError, ValueError, KeyError, TypeError):
        loss = None
    usable = isinstance(loss, float) and math.isfinite(loss)
    return SavedStep(step, {"eval_loss": loss} if usable else None)


def dispensable_steps(directory: epath.Path, train: TrainConfig) -> list[int]:
    """Steps that no rule keeps: the newest, every n-th, the best by validation loss.

    The newest is always among the kept, so that one good step stays whatever the config.
    """
    rules: list[policies.PreservationPolicy] = [policies.LatestN(train.keep_checkpoints)]
    if train.keep_every:
        rules.append(policies.EveryNSteps(train.keep_every))
    if train.keep_best:
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["eval_loss"],
            reverse=True,  # the lowest is the best
            n=train.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        rules.append(best)
    steps = [_saved_step(directory, step) for step in saved_steps(directory)]
    kept = policies.AnyPreservationPolicy(rules).should_preserve(
        steps, context=policies.PreservationContext()
    )
    return [step.step for step, keep in zip(steps, kept, strict=True) if not keep]


def remove(folder: epath.Path) -> None:
    """Deletes a step; killed on the way, it leaves nothing that looks like one."""
    leaving = folder.rename(folder.parent / (folder.name + _DELETING))
    leaving.rmtree()


def set_aside(folder: epath.Path) -> epath.Path:
    """Gives a damaged step a name that says so; returns the new path."""
    for number in range(10_000):
        target = folder.parent / f"{folder.name}{_DAMAGED}{f'.{number}' if number else ''}"
        if not target.exists():
            break
    return folder.rename(target)


def clean(directory: epath.Path, step: int | None = None) -> list[str]:
    """Removes what unfinished saves and deletions left (of one step, or all); returns the names."""
    found = [
        entry
        for entry in directory.iterdir()
        if _UNFINISHED.fullmatch(entry.name)
        and (step is None or entry.name.split(".")[0] == str(step))
    ]
    for entry in found:
        entry.rmtree(missing_ok=True)
    return sorted(entry.name for entry in found)
