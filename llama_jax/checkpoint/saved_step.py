"""Checkpoints that describe themselves: weights, optimiser, data position, config and tokenizer.

A saved step is the folder `checkpoints/N/` with five orbax items: `params`, `optimizer` (step
counter and moments), `skips` (which updates were skipped, see `train.bad_steps`), `meta` (JSON:
resolved config, data fingerprint, versions) and `tokenizer` (JSON: the tokenizer's file), and
`manifest.json` (see `manifest`). A reader that needs only the weights reads only `params`.
`Checkpointer` (in `checkpointer`) saves steps; this module reads and verifies them.
"""

import base64
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

import llama_jax
from llama_jax.checkpoint import manifest
from llama_jax.checkpoint.fingerprint import changed_arrays, fingerprint
from llama_jax.checkpoint.retention import files_named_like_steps, saved_steps
from llama_jax.config import Config, from_json
from llama_jax.errors import UserError, as_user_error, check_type, first_line, require
from llama_jax.parallel.multihost import agreed
from llama_jax.parallel.sharding import with_shardings
from llama_jax.text.saved_tokenizer import DESCRIPTION, FORMAT_VERSION, MANIFEST, check_format
from llama_jax.text.tokenizer_files import is_tokenizer_file

CHECKPOINTS = "checkpoints"
IMPORTED = "imported"  # data_fingerprint of imported weights, whose training data are unknown

Items = dict[str, Any]  # name of an item -> tree of arrays, or of `jax.ShapeDtypeStruct`s


@dataclasses.dataclass(frozen=True)
class StepMeta:
    """The description that is saved with a step.

    Attributes:
      config: the resolved config of the run.
      step: optimiser steps taken; the data position is a function of it.
      data_fingerprint: sha256 of the token shards, or of the synthetic source's parameters;
        `IMPORTED` for imported weights.
      tokenizer_model: SentencePiece model or tokenizer.json; empty for synthetic data.
      positions: the state of the batch source of each process (`data.source.BatchSource`); empty
        if the step alone determines the next batch.
      tokenizer_files: tokenizer files that came with imported weights, by name; an export writes
        them again (see `interchange`).
      device_kind: kind of the chips that saved it, such as `NVIDIA H200`; empty if imported.
      eval_loss: validation loss at this step, in nats per token; None where it was not evaluated.
      fingerprint: fingerprint of each array of the state, by path (see `fingerprint`); imported
        weights have only those of `params`.
      rewinds: rewinds that led to this step, in order, each as [step at which it happened,
        checkpoint to which it returned].
      base: fingerprints of the base that the adapters are for (`config.init_from` says where it
        is); empty where all weights are trained.
      base_context: maximum sequence length, in tokens, of the weights that the run began with; 0:
        the run began with random weights.
      parts: names of the parts that are not LLaMA's, by kind (`train.parts.Parts.names`).
      sources: fingerprint of each source of the data, by name; empty if they are not shards.
      seen: how often the weights have seen each source, in epochs, by its fingerprint; it includes
        what the weights that the run began with had seen.
    """

    config: Config
    step: int
    data_fingerprint: str
    tokenizer_model: bytes
    positions: list[list[int]] = dataclasses.field(default_factory=list)
    tokenizer_files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    device_kind: str = ""
    eval_loss: float | None = None
    fingerprint: dict[str, int] = dataclasses.field(default_factory=dict)
    rewinds: list[list[int]] = dataclasses.field(default_factory=list)
    base: dict[str, int] = dataclasses.field(default_factory=dict)
    base_context: int = 0
    parts: dict[str, str] = dataclasses.field(default_factory=dict)
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    seen: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def of_weights(self) -> Config:
        """The config of the step that made the weights; `config` is that of the whole run."""
        return self.config.of_weights(self.step)

    @property
    def context(self) -> int:
        """The longest sequence that the weights support, in tokens; shorter training keeps it."""
        began = [s.config.train.seq_len for s in self.config.stages if s.start < max(self.step, 1)]
        return max(*began, self.base_context)


class DamagedCheckpoint(UserError):
    """The content of a saved step differs from what was written."""


def meta_items(meta: StepMeta) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the items `meta` and `tokenizer` of a step."""
    description = {
        "format_version": FORMAT_VERSION,
        "step": meta.step,
        "data_fingerprint": meta.data_fingerprint,
        "positions": meta.positions,
        "device_kind": meta.device_kind,
        "eval_loss": meta.eval_loss,
        "fingerprint": meta.fingerprint,
        "rewinds": meta.rewinds,
        "base": meta.base,
        "base_context": meta.base_context,
        "parts": meta.parts,
        "sources": meta.sources,
        "seen": meta.seen,
        "config": meta.config.to_json(),
        "versions": {"llama_jax": llama_jax.__version__, "jax": jax.__version__},
    }
    files = {name: base64.b64encode(file).decode() for name, file in meta.tokenizer_files.items()}
    tokenizer = {"sentencepiece": base64.b64encode(meta.tokenizer_model).decode(), "files": files}
    return description, tokenizer


def save_meta(folder: epath.Path, meta: StepMeta) -> None:
    """Writes the items `meta` and `tokenizer` into a folder whose arrays are written separately.

    The caller writes the manifest afterwards.
    """
    for name, item in zip(("meta", "tokenizer"), meta_items(meta), strict=True):
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
            writer.save((folder / name).absolute(), item, force=True)


def fingerprints(items: Items) -> dict[str, int]:
    """Returns the fingerprints of a step's arrays, by path; paths omit the name `optimizer`."""
    trees = {name: tree for name, tree in items.items() if name != "optimizer"}
    return fingerprint(trees | items.get("optimizer", {}))


def restore_items(folder: epath.Path, targets: Items) -> Items:
    """Reads items of a step onto the mesh of their targets, and verifies every bit.

    Args:
      folder: folder of the step.
      targets: shapes, dtypes and shardings by item, as `jax.ShapeDtypeStruct`.

    Raises:
      UserError: the saved arrays do not match `targets`.
      DamagedCheckpoint: an array cannot be read, or its fingerprint differs from the saved one.
    """
    read = functools.partial(_restore_item, folder)
    found = {name: _read_by_all(read, name, target) for name, target in targets.items()}
    saved = _read_by_all(load_fingerprints, folder)
    raise_if_changed(folder, changed_arrays(saved, fingerprints(found)))
    return found


def _read_by_all(read: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `read` on all processes; if one of them finds damage, all of them raise it.

    Otherwise the others would wait for that process in the next collective operation.
    """
    found, problem = None, ""
    try:
        found = read(*arguments)
    except DamagedCheckpoint as error:
        problem = str(error)
    if problem := agreed(problem):
        raise DamagedCheckpoint(problem)
    return found


def _restore_item(folder: epath.Path, name: str, target: Any) -> Any:
    """Reads one item of a step; see `restore_items`."""
    # Not `Checkpointer.restore` of orbax: there, all processes wait for one that has failed.
    handler, place = ocp.StandardCheckpointHandler(), (folder / name).absolute()
    try:
        _check_same_arrays(place, handler.metadata(place), target)
        return handler.restore(place, args=ocp.args.StandardRestore(target))
    except Exception as error:  # orbax raises a bare Exception, or finds no arrays
        reason = manifest.first_damage(folder, items=[name])
        if isinstance(error, UserError) and not reason:
            raise
        reason = reason or first_line(error.__cause__ or error)
        raise DamagedCheckpoint(f"{folder / name} cannot be read: {reason}") from error


def load_fingerprints(folder: epath.Path) -> dict[str, int]:
    """Reads the fingerprints that were saved with a step.

    Raises:
      UserError: the step has no fingerprints: an early version imported its weights.
      DamagedCheckpoint: they cannot be read.
    """
    try:
        with as_user_error(f"{folder}/meta"):
            prints = manifest.read_description(folder)["fingerprint"]
    except UserError as error:
        raise DamagedCheckpoint(str(error)) from error
    if not prints:
        raise _too_early(folder, "fingerprint")
    return prints


def _too_early(folder: epath.Path, name: str) -> UserError:
    return UserError(
        f"{folder} was saved by an early version of llama_jax, which wrote no {name}, and cannot "
        "be read"
    )


def raise_if_changed(folder: epath.Path, changed: list[str]) -> None:
    """Raises `DamagedCheckpoint` if arrays differ from the fingerprints saved with a step.

    Args:
      folder: folder of the step.
      changed: names of the arrays that differ.
    """
    if changed:
        raise DamagedCheckpoint(
            f"{folder} differs from what was saved: {', '.join(changed)} (fingerprint)"
        )


def _refuse(folder: epath.Path, reason: str) -> None:
    if reason:
        raise DamagedCheckpoint(f"{folder} is damaged: {reason}")


def _check_same_arrays(folder: epath.Path, saved: Any, target: Any) -> None:
    """Raises `UserError` if a shape or dtype differs; orbax would silently cast to the target's."""
    expected = jax.tree.leaves(target)
    arrays = jax.tree.leaves(saved)
    if len(arrays) != len(expected):
        raise UserError(f"{folder} holds {len(arrays)} arrays, this config has {len(expected)}")
    have = sorted((tuple(a.shape), str(a.dtype)) for a in arrays)
    want = sorted((tuple(a.shape), str(a.dtype)) for a in expected)
    if have != want:
        difference = next((h, w) for h, w in zip(have, want, strict=True) if h != w)
        raise UserError(
            f"{folder} holds an array {difference[0]}, this config needs {difference[1]}"
        )


def steps_folder(path: epath.Path) -> epath.Path:
    """Returns the folder of the steps: `path` itself, or the one in the work directory `path`."""
    return path if path.name == CHECKPOINTS else path / CHECKPOINTS


def find_step(checkpoint: epath.PathLike, *, pass_over: bool = True) -> epath.Path:
    """Returns the step folder that a user means: `checkpoint` itself, or the newest of a run.

    In a work directory, skips steps with missing or truncated files and prints a warning for each.

    Args:
      checkpoint: a work directory, or the folder of a step.
      pass_over: False: a damaged step raises an error, so that no older one is published unnoticed.

    Raises:
      UserError: no undamaged step exists.
    """
    path = epath.Path(checkpoint)
    if (path / "params").exists():
        # Checked here, because orbax prints many lines about a damaged small file.
        items = ("params", *DESCRIPTION)
        if reason := manifest.first_damage(path, quick=True, items=items):
            raise DamagedCheckpoint(f"{path} differs from what was saved: {reason}")
        return path
    folder = steps_folder(path)
    if not folder.is_dir():
        raise UserError(f"no checkpoint in {path}: it is neither a work directory nor a saved step")
    steps = saved_steps(folder)
    for step in reversed(steps):
        reason = manifest.first_damage(folder / str(step), quick=True)
        if not reason:
            return folder / str(step)
        if not pass_over:
            raise DamagedCheckpoint(
                f"{folder / str(step)} is damaged: {reason}; restore it from a copy, or name "
                "the folder of an older step"
            )
        print(f"warning: {folder / str(step)} is damaged: {reason}", file=sys.stderr)
    if steps:
        raise UserError(f"no good checkpoint is left in {folder}")
    if files := files_named_like_steps(folder):
        raise UserError(f"no good checkpoint is left in {folder}: {files[0]} is a file, not a step")
    raise UserError(f"no complete checkpoint in {folder} yet")


def load_meta(step_folder: epath.PathLike, architecture: str = "") -> StepMeta:
    """Reads the description of a saved step.

    Args:
      step_folder: the folder of the step.
      architecture: name of the architecture that the caller computes with; empty: LLaMA.

    Raises:
      UserError: the folder is not a saved step, or has another format or architecture.
      DamagedCheckpoint: the description differs from what was written.
    """
    folder = epath.Path(step_folder).absolute()
    if not folder.is_dir():
        raise UserError(f"{folder} is not a readable checkpoint: there is no such folder")
    _refuse(folder, manifest.first_damage(folder, items=DESCRIPTION))
    meta = manifest.read_description(folder)
    tokenizer = manifest.read_description(folder, "tokenizer")
    with as_user_error(f"{folder}/meta"):
        check_format(folder, meta)
        for name in (*_TYPES, "eval_loss"):
            if name not in meta:
                raise _too_early(folder, name)
        found = {name: check_type(name, meta[name], kind) for name, kind in _TYPES.items()}
        loss = meta["eval_loss"]
        for name in ("fingerprint", "base"):
            require(_are_counts(found[name].values()), f"{name} must map names to numbers")
        for name in ("positions", "rewinds"):
            good = all(isinstance(entry, list) and _are_counts(entry) for entry in found[name])
            require(good, f"{name} must be lists of numbers")
        good = all(len(entry) == 2 for entry in found["rewinds"])
        require(good, "rewinds must be lists of 2 numbers")
        described = StepMeta(
            config=from_json(check_type("config", meta["config"], str)),
            tokenizer_model=b"",
            eval_loss=None if loss is None else float(loss),
            **{n: check_type(n, meta.get(n, {}), dict) for n in ("parts", "sources", "seen")},
            **found,
        )
        require(_are_counts([described.step, described.base_context]), "step is out of range")
        names = (*described.parts.values(), *described.sources.values())
        require(all(type(name) is str for name in names), "parts and sources must be names")
        numbers = described.seen.values()
        good = all(type(value) is float and 0 <= value < math.inf for value in numbers)
        require(good, "seen must be numbers")
    _check_architecture(folder, described.parts.get("architecture", ""), architecture)
    with as_user_error(f"{folder}/tokenizer"):
        files = tokenizer["files"]
        for name in files:  # an export uses the name as a path
            if not is_tokenizer_file(name):
                raise UserError(f"{folder} holds a file {name!r}, which is not a tokenizer file")
        return dataclasses.replace(
            described,
            tokenizer_model=base64.b64decode(tokenizer["sentencepiece"]),
            tokenizer_files={name: base64.b64decode(file) for name, file in files.items()},
        )


def _check_architecture(folder: epath.Path, saved: str, wanted: str) -> None:
    """Raises UserError unless a step is of the architecture that computes with it."""
    if saved and saved != wanted:
        raise UserError(
            f"{folder} was trained with an architecture of its own, {saved}, and cannot be read as "
            f"{wanted or 'a LLaMA'}; use Python code that defines that class, see docs/research.md"
        )
    if wanted and not saved:
        raise UserError(f"{folder} holds a LLaMA, and cannot be read as {wanted}")


_TYPES: dict[str, type] = {
    "step": int,
    "data_fingerprint": str,
    "positions": list,
    "device_kind": str,
    "fingerprint": dict,
    "rewinds": list,
    "base": dict,
    "base_context": int,
}


def _are_counts(values: Iterable[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def load_adapters(step_folder: epath.PathLike, shapes: Any) -> Any:
    """Reads the adapters of a saved step into NumPy; `shapes` is a tree of shapes and dtypes.

    Raises:
      UserError: see `load_params`.
    """
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: one, shapes)
    return jax.device_get(load_params(step_folder, with_shardings(shapes, shardings)))


def load_params(step_folder: epath.PathLike, target: Any) -> Any:
    """Reads only the weights of a saved step.

    Args:
      step_folder: folder of the step.
      target: shapes, dtypes and shardings of the weights, as `with_shardings` returns them.

    Raises:
      UserError: the saved arrays do not match `target`.
      DamagedCheckpoint: the arrays cannot be read, or differ from what was saved.
    """
    folder = epath.Path(step_folder).absolute()
    return restore_items(folder, {"params": target})["params"]


def check_steps(path: epath.Path) -> Iterator[tuple[epath.Path, str]]:
    """Reads every file of the steps in a work directory, or of one step.

    Yields:
      The folder of each step, and its first damage; '' if every file is as it was written.

    Raises:
      UserError: no step exists.
    """
    if (path / "params").exists() or (path / MANIFEST).exists():
        folders = [path]
    else:
        folder = steps_folder(path)
        steps = saved_steps(folder)
        if not steps:
            raise UserError(f"no checkpoint in {path}: it has no saved step")
        folders = [folder / str(step) for step in steps]
    for folder in folders:
        yield folder, manifest.first_damage(folder)
