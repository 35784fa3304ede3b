"""Finds what a run goes on from: its own steps, a step of another run (a branch), or weights.

This reads only descriptions of saved steps, before the data are opened. `start` restores the state.
"""

import contextlib
import dataclasses
import json
import os

import jax
from etils import epath

from llama_jax.checkpoint.retention import saved_steps
from llama_jax.checkpoint.saved_step import CHECKPOINTS, StepMeta, find_step, load_meta
from llama_jax.config import Config, field_types, from_json, replaced
from llama_jax.errors import UserError
from llama_jax.files import read_bytes
from llama_jax.interchange.opening import init_place
from llama_jax.parallel.multihost import broadcast_text
from llama_jax.train.changes import (
    ACCEPTABLE,
    Changes,
    changed_since,
    last_change,
    refused,
    with_past,
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Describes what a run goes on from.

    Attributes:
      asked: the config that the user gave.
      config: the same config, with the past of the run as its first stages.
      step: the step from which the given config holds; 0 for a new run.
      accept: fields whose change the user accepts.
      initial: description of the checkpoint that `init_from` names, for a new run; None: the run
        does not begin with a checkpoint.
      past: the config of the run in its work directory until `step`; None: there is no run.
    """

    asked: Config
    config: Config
    step: int = 0
    accept: tuple[str, ...] = ()
    initial: StepMeta | None = None
    past: Config | None = None

    def accepted(self, saved: StepMeta) -> tuple[str, ...]:
        """Returns the fields in which the run may differ from a saved step.

        These are the fields that the user accepts. If newer steps are damaged, the run also goes
        back to a step before a change that was accepted earlier: that needs no flag again.

        Args:
          saved: the description of the step.
        """
        past, asked = self.past, self.asked
        if past is None or refused(changed_since(past, asked, self.step), asked, ()):
            return self.accept
        earlier = changed_since(saved.config, past, saved.step)
        return (*self.accept, *(name for name in earlier if name in ACCEPTABLE))

    def new_changes(self, changes: Changes) -> Changes:
        """Returns the changes that the run has not made yet.

        Args:
          changes: differences from a saved step, which may be older than the last change.
        """
        if self.past is None:
            return changes
        others = {name: pair for name, pair in changes.items() if name not in field_types()}
        return changed_since(self.past, self.asked, self.step) | others


def find_origin(
    config: Config, workdir: epath.Path, accept: tuple[str, ...] = (), architecture: str = ""
) -> Origin:
    """Finds what a run goes on from; all processes must call it.

    Args:
      config: the config that the user gave.
      workdir: the work directory.
      accept: fields whose change the user accepts, see `changes.accepted_fields`.
      architecture: name of the architecture of the run; empty: LLaMA.

    Raises:
      UserError: the branch's step or the initial checkpoint cannot be read.
    """
    # Process 0 decides, because the others may see a new step late.
    mine = _find(config, workdir, accept, architecture) if jax.process_index() == 0 else None
    found = json.loads(broadcast_text(json.dumps(mine)))
    if found is None:
        return Origin(config, config, 0, accept, _initial(config))
    step, stages, start, past = found
    asked = replaced(config, {"data.start": start})
    whole = replaced(asked, {"train.stages": stages})
    return Origin(asked, whole, step, accept, past=from_json(past) if past else None)


def _find(
    config: Config, workdir: epath.Path, accept: tuple[str, ...], architecture: str
) -> tuple[int, str, str, str] | None:
    """Returns what a run goes on from; see `find_origin`.

    Returns:
      None for a new run. Otherwise the step from which the given config holds, `train.stages` with
      the past of the run, `data.start`, and the config of the run in the work directory until that
      step as JSON; "" if it is another run that the branch leaves.
    """
    saved = own = _newest(workdir, architecture)
    if saved is None and config.branch_from:
        saved = load_meta(branch_folder(config.branch_from), architecture)
    if saved is None:
        return None
    if config.data.start == "auto":
        config = replaced(config, {"data.start": saved.config.data.start})
    past, at = saved.config, saved.step
    if own is not None and (later := _changed_later(workdir, config, at)):
        past, at = later
    wrong = refused(changed_since(past, config, at), config, accept) if own is not None else {}
    whole = config if wrong else with_past(past, config, at)  # `check_checkpoint` refuses the run
    return at, whole.train.stages, config.data.start, past.to_json() if own else ""


def _changed_later(workdir: epath.Path, config: Config, step: int) -> tuple[Config, int] | None:
    """Returns the config that the run has saved, and the step of its last accepted change.

    If newer steps are damaged, a run goes back to a step before this change, and makes the steps in
    between with the old values. A start after a kill in these steps must do so, too.

    Args:
      workdir: the work directory.
      config: the config that the user gave.
      step: the newest step.

    Returns:
      None if the change is not after this step, or if it was to other values than now.
    """
    with contextlib.suppress(UserError, OSError):  # then only the checkpoints count
        at = last_change(workdir)
        if at > step:
            saved = from_json(read_bytes(workdir / "config.json"))
            if not refused(changed_since(saved, config, at), config, ()):
                return saved, at
    return None


def _newest(workdir: epath.Path, architecture: str) -> StepMeta | None:
    """Returns the description of the newest step whose description can be read."""
    for step in reversed(saved_steps(workdir / CHECKPOINTS)):
        with contextlib.suppress(UserError):  # `initial_state` reports it
            return load_meta(workdir / CHECKPOINTS / str(step), architecture)
    return None


def _initial(config: Config) -> StepMeta | None:
    if not config.init_from.startswith("ckpt:"):
        return None
    return load_meta(find_step(init_place(config.init_from)[1], pass_over=False))


def branch_folder(place: str) -> epath.Path:
    """Returns the folder of the step that `branch_from` names.

    Raises:
      UserError: there is no such step.
    """
    path = epath.Path(place)
    if path.is_dir():
        return find_step(path, pass_over=False)
    steps = saved_steps(path.parent) if path.parent.name == CHECKPOINTS else []
    found = f"; the saved steps are {', '.join(map(str, steps))}" if steps else ""
    raise UserError(f"branch_from={place} does not exist{found}")


def with_data_of_trunk(config: Config, workdir: epath.Path) -> Config:
    """Returns the config of a branch with the data and the tokenizer of the run that it leaves.

    Fields of `data` that name others are kept.

    Args:
      config: the config of the branch.
      workdir: its work directory, which knows the data if the other run is gone.

    Raises:
      UserError: the step to branch from, or the shards that its config names, do not exist.
    """
    data = config.data
    if not config.branch_from or data.path or data.source == "synthetic":
        return config
    own = _newest(workdir, "")
    if own is not None:
        return replaced(config, {"data.path": own.config.data.path})
    folder = branch_folder(config.branch_from)
    trunk = folder.absolute().parent.parent
    if data.streaming:
        file = trunk / "tokenizer.model"  # `run` writes it
        known = not data.tokenizer and file.exists()
        return replaced(config, {"data.tokenizer": os.fspath(file)}) if known else config
    named = load_meta(folder).config.data.path
    path = named or os.fspath(trunk / "data")
    if named and not epath.Path(named).exists():  # relative to another folder, for example
        raise UserError(
            f"{folder} was trained on the shards in data.path={named}, which do not exist here; "
            "say where they are: --config.data.path=FOLDER"
        )
    return replaced(config, {"data.path": path}) if epath.Path(path).exists() else config
