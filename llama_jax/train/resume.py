"""Checks that a run may continue: its directory, config and data match, on all processes."""

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterator

import jax
from etils import epath

from llama_jax import files
from llama_jax.checkpoint.retention import saved_steps
from llama_jax.checkpoint.saved_step import CHECKPOINTS, StepMeta
from llama_jax.config import Config, changed_fields, from_json
from llama_jax.data.training_data import TrainingData
from llama_jax.errors import UserError
from llama_jax.files import is_object_store, read_bytes
from llama_jax.parallel.multihost import broadcast_text
from llama_jax.train.changes import (
    ACCEPT_DATA,
    CHANGES,
    OTHER_DATA,
    Changes,
    changed_since,
    last_change,
    listed,
    mend,
    refused,
)
from llama_jax.train.parts import LLAMA_PARTS, Parts

# Files of a work directory; lines are appended to those in `ADDED_TO`.
ADDED_TO = ("metrics.jsonl", CHANGES)
FILES = ("config.json", "tokenizer.model", "goodput.json", *ADDED_TO)

# Fields that must agree on all processes of a job; places of data and weights may differ.
_OF_ALL = ("model.", "mesh.", "dcn.", "optim.", "lora.", "train.", "data.streaming")


def check_same_config(config: Config) -> None:
    """Checks that all processes of the job train the same model; all of them must call it.

    Raises:
      UserError: this process has another config than process 0.
    """
    first, me = from_json(broadcast_text(config.to_json())), jax.process_index()
    changed = [
        f"{name} is {theirs} on process 0 and {ours} on process {me}"
        for name, (theirs, ours) in changed_fields(first, config).items()
        if name.startswith(_OF_ALL)
    ]
    if changed:
        raise UserError(
            f"the processes of this job have different configs ({'; '.join(changed)}); start all "
            "of them with the same config"
        )


def check_prepared(config: Config, folder: epath.Path) -> None:
    """Checks that this process sees the folder in which process 0 has prepared the data.

    Raises:
      UserError: this process does not see the folder.
    """
    data = config.data
    own = not data.path and data.source != "synthetic" and not (data.streaming and data.tokenizer)
    if own and not folder.exists():
        raise UserError(
            f"process 0 has prepared the data in {folder}, which does not exist on process "
            f"{jax.process_index()}; --workdir must be on a file system that all hosts share"
        )


def check_same_data(fingerprint: str) -> None:
    """Checks that all processes of the job have the same data; all of them must call it.

    Raises:
      UserError: this process has other data than process 0.
    """
    first = broadcast_text(fingerprint)
    if first != fingerprint:
        raise UserError(
            f"the processes of this job have different data: {first} on process 0, {fingerprint} "
            f"on process {jax.process_index()}; copy the same shards to all hosts, or name a "
            "folder that they share"
        )


def check_workdir(config: Config, workdir: epath.Path, accept: Collection[str] = ()) -> None:
    """Checks that the directory holds no run with another config.

    Args:
      config: the config of this run.
      workdir: the work directory.
      accept: fields whose change the user accepts.

    Raises:
      UserError: the run in `workdir` trains something different, or its files cannot be written.
    """
    _check_places(workdir, config)
    path = workdir / "config.json"
    if path.exists():
        try:
            saved = from_json(read_bytes(path))
        except UserError as error:
            raise UserError(
                f"{path}: {error}; use another --workdir, or remove the file if the run is yours: "
                "its checkpoints hold the config, too"
            ) from error
        if config.branch_from not in ("", saved.branch_from):
            own = f", or go on with it: --config.branch_from={saved.branch_from}"
            raise UserError(
                f"{workdir} holds a run, and a branch (branch_from={config.branch_from}) needs a "
                f"new work directory; use another --workdir{own if saved.branch_from else ''}"
            )
        # A change before the first save, or where newer steps were damaged, is after all steps.
        step = max([last_change(workdir), *saved_steps(workdir / CHECKPOINTS)])
        changed = refused(changed_since(saved, config, step), config, accept)
        if changed:
            raise UserError(
                f"{workdir} holds a run of another config ({listed(changed)}); "
                f"{mend(changed, 'use another --workdir, or the same values')}"
            )


def _check_places(workdir: epath.Path, config: Config) -> None:
    """Checks that a run can write its files and folders, so that it does not fail later.

    Raises:
      UserError: a folder has the name of a file of a run, a file has the name of a folder, or a
        file that a run appends to is not writable.
    """
    if is_object_store(workdir):
        return
    folders = [CHECKPOINTS, "tensorboard", "plots"]
    if config.data.source != "synthetic" and not config.data.path:
        folders.append("data")
    for name in (*FILES, *folders):
        path, wanted = workdir / name, "folder" if name in folders else "file"
        found = _kind(path)
        if found == "link":  # a file can be created through a dangling link, a folder cannot
            place = os.path.realpath(path)
            found = "file" if os.path.isdir(os.path.dirname(place)) else f"link to {place}"
        if found and found != wanted:
            raise UserError(
                f"{path} is a {found}, and a run keeps a {wanted} of that name; move it away, or "
                "use another --workdir"
            )
        if found and name in ADDED_TO and os.path.exists(path) and not os.access(path, os.W_OK):
            raise UserError(f"{path} cannot be written to; change its mode or owner")


def _kind(path: epath.Path) -> str:
    """Returns `folder`, `file`, `link` (a dangling one), or "" if the path does not exist."""
    if os.path.isdir(path):
        return "folder"
    return "file" if os.path.exists(path) else "link" * os.path.islink(path)


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Locks the work directory for this process, see `files.locked`.

    Raises:
      UserError: another process trains in the directory, or the directory cannot be created.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(
                files.locked(
                    workdir,
                    f"another process trains in {workdir}; wait for its end, or use another "
                    "--workdir",
                )
            )
        except OSError as error:
            found = f"it is a {_kind(workdir)}" if _kind(workdir) else error.strerror
            raise UserError(f"{workdir} cannot be a work directory: {found}") from error
        yield


def check_checkpoint(
    saved: StepMeta,
    folder: epath.PathLike,
    config: Config,
    data: TrainingData,
    parts: Parts = LLAMA_PARTS,
    accept: Collection[str] = (),
) -> Changes:
    """Compares this run with the description in a checkpoint.

    `config.json` is not enough for this, because it may be missing or edited.

    Args:
      saved: the description in the checkpoint.
      folder: the folder of the checkpoint, for errors.
      config: the config of this run.
      data: the data of this run.
      parts: the parts of this run.
      accept: fields whose change the user accepts, see `changes.accepted_fields`.

    Returns:
      The allowed changes: fields of the config, and `data fingerprint`.

    Raises:
      UserError: there are other changes, which the error lists; or the data have changed and
        `data.accept_other_data` is False.
    """
    changes = changed_since(saved.config, config, saved.step)
    others = refused(changes, config, accept)
    model = data.tokenizer.model_bytes if data.tokenizer else b""
    if saved.tokenizer_model != model:  # no flag allows this: weights depend on token ids
        shas = (hashlib.sha256(each).hexdigest()[:16] for each in (saved.tokenizer_model, model))
        others["tokenizer's sha256"] = (next(shas), next(shas))
    others |= changed_parts(saved.parts, parts.names())
    if others:
        advice = mend(others, "use the same values, or another --workdir")
        raise UserError(f"checkpoint {folder} belongs to another run ({listed(others)}); {advice}")
    if saved.data_fingerprint != data.fingerprint and not _more_of_the_same(saved, data, accept):
        if not (config.data.accept_other_data or _accepts_data(accept)):
            if saved.data_fingerprint == data.former_fingerprint and _is_mixed(saved.config):
                raise UserError(
                    f"checkpoint {folder} was trained by a version that took data.mixture as shares"
                    " of sequences; they are shares of tokens now, which gives other batches: use "
                    f"another --workdir, or accept the new batches with {ACCEPT_DATA}"
                )
            raise UserError(
                f"checkpoint {folder} was trained on data {saved.data_fingerprint}, but this is "
                f"data {data.fingerprint}; restore those shards, use another --workdir, or "
                f"accept these data with {ACCEPT_DATA}"
            )
        changes["data fingerprint"] = (saved.data_fingerprint, data.fingerprint)
    return changes


def _accepts_data(accept: Collection[str]) -> bool:
    """Returns whether a change of the text to train on is accepted."""
    return any(name in OTHER_DATA and name != "data.mixture" for name in accept)


def _is_mixed(config: Config) -> bool:
    """Returns whether the config asks for shares of the sources in some steps."""
    return any(stage.config.data.mixture for stage in config.stages)


def _more_of_the_same(saved: StepMeta, data: TrainingData, accept: Collection[str]) -> bool:
    """Returns whether only the choice of sources differs, and this change is accepted."""
    same = [
        saved.sources[name] == found
        for name, found in data.sources.items()
        if name in saved.sources
    ]
    if not saved.sources and not _is_mixed(saved.config):  # an earlier version did not save them
        same = [saved.data_fingerprint in (data.former_fingerprint, *data.sources.values())]
    return bool({"data.mixture", "train.stages"} & {*accept}) and bool(same) and all(same)


def changed_parts(saved: dict[str, str], now: dict[str, str]) -> Changes:
    """Returns the parts that differ from those of a checkpoint, by kind: the old and new names."""
    kinds = sorted(saved.keys() | now.keys())
    values = {kind: (saved.get(kind, "LLaMA's"), now.get(kind, "LLaMA's")) for kind in kinds}
    return {f"the {kind}": pair for kind, pair in values.items() if pair[0] != pair[1]}
