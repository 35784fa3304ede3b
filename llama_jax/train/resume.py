"""Checks that a run may continue: its directory, config and data match, on all processes."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from llama_jax import files
from llama_jax.checkpoint.saved_step import CHECKPOINTS, StepMeta
from llama_jax.config import Config, changed_fields, from_json
from llama_jax.data.training_data import TrainingData
from llama_jax.errors import UserError
from llama_jax.files import append_jsonl, is_object_store, read_bytes
from llama_jax.parallel.multihost import broadcast_text
from llama_jax.train.parts import LLAMA_PARTS, Parts

# Fields that may change when a run is resumed: they do not change what is trained.
RESUMABLE = (
    *("mesh.", "dcn.", "model.attention", "model.remat", "model.scan_unroll", "data.path"),
    *("data.tfds_data_dir", "data.workers", "data.part_bytes", "data.shard_tokens"),
    # Where the tokenizer is and how it was made; the checkpoint holds the tokenizer itself.
    *("data.accept_other_data", "data.tokenizer", "data.tokenizer_size"),
    *("train.log_every", "train.eval_every", "train.eval_batches", "train.checkpoint_every"),
    *("train.keep_checkpoints", "train.sample_prompt", "train.profile_steps"),
    *("train.step_timeout", "train.save_timeout"),
    # The handling of faults: a user must be able to change it after a fault.
    *("train.max_skipped", "train.spike_factor", "train.norm_stats"),
    *("train.max_rewinds", "train.rewind_steps"),
    *("train.keep_every", "train.keep_best", "train.max_failed_saves"),
)
# Fields that select the text to train on; they may change with `ACCEPT_DATA`.
OTHER_DATA = (
    *("data.source", "data.text_field", "data.tfds_split", "data.mixture", "data.packing"),
    "data.separator",
    *("data.validation_fraction", "data.max_document_bytes", "data.template"),
)
ACCEPT_DATA = "--config.data.accept_other_data=True"
CHANGES = "changes.jsonl"  # accepted changes: a line for each resume with changes
# Files of a work directory; lines are appended to those in `ADDED_TO`.
ADDED_TO = ("metrics.jsonl", CHANGES)
FILES = ("config.json", "tokenizer.model", "goodput.json", *ADDED_TO)

Changes = dict[str, tuple[Any, Any]]  # old and new value of each changed field


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


def check_workdir(config: Config, workdir: epath.Path) -> None:
    """Checks that the directory holds no run with another config.

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
        changed = _refused(changed_fields(saved, config), config)
        if changed:
            raise UserError(
                f"{workdir} holds a run of another config ({_listed(changed)}); "
                f"{_mend(changed, 'use another --workdir, or the same values')}"
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


def _refused(changes: Changes, config: Config) -> Changes:
    """Returns the changes that are not allowed: the run would train something different."""
    allowed = RESUMABLE + (OTHER_DATA if config.data.accept_other_data else ())
    if config.lora.rank:  # the place of the base; the checkpoint has fingerprints of its arrays
        allowed += ("init_from",)
    return {name: values for name, values in changes.items() if not name.startswith(allowed)}


def _listed(changes: Changes) -> str:
    return "; ".join(f"{name} is {was}, now {now}" for name, (was, now) in changes.items())


def _mend(changes: Changes, otherwise: str) -> str:
    """Returns the advice for an error, with the flag if it would allow all changes."""
    if all(name.startswith(OTHER_DATA) for name in changes):
        return f"{otherwise}, or accept the other data with {ACCEPT_DATA}"
    return otherwise


def check_checkpoint(
    saved: StepMeta,
    folder: epath.PathLike,
    config: Config,
    data: TrainingData,
    parts: Parts = LLAMA_PARTS,
) -> Changes:
    """Compares this run with the description in a checkpoint.

    `config.json` is not enough for this, because it may be missing or edited.

    Args:
      saved: the description in the checkpoint.
      folder: the folder of the checkpoint, for errors.
      config: the config of this run.
      data: the data of this run.
      parts: the parts of this run.

    Returns:
      The allowed changes: fields of the config, and `data fingerprint`.

    Raises:
      UserError: there are other changes, which the error lists; or the data have changed and
        `data.accept_other_data` is False.
    """
    changes = changed_fields(saved.config, config)
    refused = _refused(changes, config)
    model = data.tokenizer.model_bytes if data.tokenizer else b""
    if saved.tokenizer_model != model:  # no flag allows this: weights depend on token ids
        shas = (hashlib.sha256(each).hexdigest()[:16] for each in (saved.tokenizer_model, model))
        refused["tokenizer's sha256"] = (next(shas), next(shas))
    refused |= changed_parts(saved.parts, parts.names())
    if refused:
        mend = _mend(refused, "use the same values, or another --workdir")
        raise UserError(f"checkpoint {folder} belongs to another run ({_listed(refused)}); {mend}")
    if saved.data_fingerprint != data.fingerprint:
        if not config.data.accept_other_data:
            if saved.data_fingerprint == data.former_fingerprint:
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


def changed_parts(saved: dict[str, str], now: dict[str, str]) -> Changes:
    """Returns the parts that differ from those of a checkpoint, by kind: the old and new names."""
    kinds = sorted(saved.keys() | now.keys())
    values = {kind: (saved.get(kind, "LLaMA's"), now.get(kind, "LLaMA's")) for kind in kinds}
    return {f"the {kind}": pair for kind, pair in values.items() if pair[0] != pair[1]}


def record_changes(workdir: epath.Path, step: int, changes: Changes) -> str:
    """Records in `changes.jsonl` the changes that a run resumes with.

    Args:
      workdir: the work directory.
      step: the step that the run resumes from.
      changes: the changes that `check_checkpoint` allowed.

    Returns:
      A line for the log; empty without changes.
    """
    if not changes:
        return ""
    if jax.process_index() == 0:
        append_jsonl(workdir / CHANGES, [{"step": step, "changes": changes}])
    return f"changed since: {_listed(changes)}"
