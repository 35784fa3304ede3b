"""What a run goes on from: its own saved steps, a step of another run (a branch), or weights.

This reads only descriptions of saved steps, before the data are opened. `start` restores the state.
"""

import contextlib
import dataclasses
import os

from etils import epath

from llama_jax.checkpoint.retention import saved_steps
from llama_jax.checkpoint.saved_step import CHECKPOINTS, StepMeta, find_step, load_meta
from llama_jax.config import Config, replaced
from llama_jax.errors import UserError
from llama_jax.interchange.opening import init_place
from llama_jax.parallel.multihost import broadcast_text
from llama_jax.train.changes import changed_since, refused, with_past


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a run goes on from.

    Attributes:
      asked: the config that the user gave.
      config: the same config, with the past of the run as its first stages.
      step: the step from which the given config holds; 0 for a new run.
      accept: fields whose change the user accepts.
      initial: description of the checkpoint that `init_from` names, for a new run; None: the run
        does not begin with a checkpoint.
    """

    asked: Config
    config: Config
    step: int = 0
    accept: tuple[str, ...] = ()
    initial: StepMeta | None = None


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
    saved = _newest(workdir, architecture)
    if saved is not None and refused(
        changed_since(saved.config, config, saved.step), config, accept
    ):
        return Origin(config, config, saved.step, accept)  # `check_checkpoint` refuses the run
    if saved is None and config.branch_from:
        saved = load_meta(branch_folder(config.branch_from), architecture)
    if saved is None:
        return Origin(config, config, 0, accept, _initial(config))
    begun = saved.config.data.start
    if config.data.start == "auto":
        config = replaced(config, {"data.start": begun})
    whole = with_past(saved.config, config, saved.step)
    # The others may see a new step late.
    step, _, stages = broadcast_text(f"{saved.step} {whole.train.stages}").partition(" ")
    return Origin(config, replaced(config, {"train.stages": stages}), int(step), accept)


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
      UserError: the step to branch from does not exist.
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
    path = load_meta(folder).config.data.path or os.fspath(trunk / "data")
    return replaced(config, {"data.path": path}) if epath.Path(path).exists() else config
