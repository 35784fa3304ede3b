"""Checkpoints that describe themselves: weights, optimiser, data position, config and tokenizer.

A saved step is the folder `checkpoints/N/` with five orbax items: `params`, `optimizer` (step
counter and moments), `skips` (what was skipped, see `skips`), `meta` (JSON: resolved config, data
fingerprint, versions) and `tokenizer` (JSON: the tokenizer's file), and `manifest.json` (see
`manifest`). Whoever needs only the weights reads only them. `Checkpointer` (in `checkpointer`)
saves steps; here they are read and verified.

Example:
  python -m llama_jax.checkpoint --verify=runs/tiny
"""

import base64
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import flags
from etils import epath

import llama_jax
from llama_jax import cli, manifest
from llama_jax.config import Config, from_json
from llama_jax.errors import UserError, first_line
from llama_jax.fingerprint import difference, fingerprint
from llama_jax.interchange.formats import is_tokenizer_file
from llama_jax.retention import saved_steps
from llama_jax.step import abstract_state

# Bump when a saved step can no longer be read as before. 2: with `skips`.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a saved step says about itself.

    Attributes:
      config: the resolved config of the run.
      step: optimiser steps taken; the data position is a function of it.
      data_fingerprint: sha256 of the token shards, or of the synthetic source's parameters.
      tokenizer_model: SentencePiece model or tokenizer.json; empty for synthetic data.
      positions: of each process in streamed data (`data.streaming.Position`); else empty.
      tokenizer_files: of imported weights, by name, for tokenizers that are not SentencePiece and
        for the way back (see `interchange`).
      device_kind: of the chips that saved it, such as `NVIDIA H200`; empty for imported weights.
      eval_loss: validation loss at this step, in nats per token; None where it was not evaluated.
      fingerprint: of each array of the state, by path (see `fingerprint`); empty if imported.
      rewinds: that led to this step, in order: [step at which, checkpoint to which].
      base: fingerprints of the base that the adapters are for (`config.init_from` says where it
        is); empty where all weights are trained.
      base_context: longest sequence, in tokens, that the weights which the run began with were
        made for; 0: it began with random ones.
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

    @property
    def context(self) -> int:
        """Longest sequence that the weights are for, in tokens; training on short ones keeps it."""
        return max(self.config.train.seq_len, self.base_context)


class DamagedCheckpoint(UserError):
    """A saved step is not as it was written."""


def meta_items(meta: Meta) -> tuple[dict[str, Any], dict[str, Any]]:
    """The items `meta` and `tokenizer` of a step."""
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
        "config": meta.config.to_json(),
        "versions": {"llama_jax": llama_jax.__version__, "jax": jax.__version__},
    }
    files = {name: base64.b64encode(file).decode() for name, file in meta.tokenizer_files.items()}
    tokenizer = {"sentencepiece": base64.b64encode(meta.tokenizer_model).decode(), "files": files}
    return description, tokenizer


def save_meta(folder: epath.Path, meta: Meta) -> None:
    """Writes what a step says about itself, into a folder whose arrays come from elsewhere."""
    for name, item in zip(("meta", "tokenizer"), meta_items(meta), strict=True):
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
            writer.save((folder / name).absolute(), item)


def restore_items(folder: epath.Path, items: dict[str, Any], build: Callable[..., Any]) -> Any:
    """Reads items of a step onto the mesh of their targets, and checks every bit of them.

    Args:
      folder: of the step.
      items: targets (shape, dtype, sharding) by item.
      build: makes of the items read the tree whose paths have the names of the fingerprint.

    Raises:
      UserError: the saved arrays are not those asked for.
      DamagedCheckpoint: they cannot be read, or their fingerprints are not the saved ones.
    """
    found = {}
    for name, target in items.items():
        with ocp.StandardCheckpointer() as checkpointer:
            try:
                saved = checkpointer.metadata(folder / name).item_metadata
                _check_same_arrays(folder / name, saved, target)
                found[name] = checkpointer.restore((folder / name).absolute(), target)
            except UserError:
                raise
            except Exception as error:  # orbax raises a bare Exception for a damaged array
                reason = first_line(error.__cause__ or error)
                raise DamagedCheckpoint(f"{folder / name} cannot be read: {reason}") from error
    tree = build(found)
    prints = _saved_fingerprint(folder)
    changed = difference(prints, fingerprint(tree)) if prints else []
    if changed:
        raise DamagedCheckpoint(
            f"{folder} does not give back what was saved: {', '.join(changed)} (fingerprint)"
        )
    return tree


def _saved_fingerprint(folder: epath.Path) -> dict[str, int]:
    """Fingerprints that were saved with a step; empty for what has none."""
    try:
        return manifest.described(folder).get("fingerprint", {})
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{folder}/meta cannot be read: {error}") from error


def _check_same_arrays(folder: epath.Path, saved: Any, target: Any) -> None:
    """Orbax casts silently to the dtype asked for; here another dtype or shape is an error."""
    expected = jax.tree.leaves(target)
    arrays = jax.tree.leaves(saved)
    if len(arrays) != len(expected):
        raise UserError(f"{folder} holds {len(arrays)} arrays, this config has {len(expected)}")
    have = sorted((tuple(a.shape), str(a.dtype)) for a in arrays)
    want = sorted((tuple(a.shape), str(a.dtype)) for a in expected)
    if have != want:
        difference = next((h, w) for h, w in zip(have, want, strict=True) if h != w)
        raise UserError(f"{folder} holds an array {difference[0]}, this config {difference[1]}")


def _steps_folder(path: epath.Path) -> epath.Path:
    """Where the steps of a work directory are, which may be named itself."""
    return path if path.name == CHECKPOINTS else path / CHECKPOINTS


def find_step(checkpoint: epath.PathLike) -> epath.Path:
    """The step folder that a user means: the newest of a work directory, or the folder itself.

    Of a work directory, steps with files that are missing or cut are passed over, with a warning.

    Raises:
      UserError: there is none.
    """
    path = epath.Path(checkpoint)
    if (path / "params").exists():
        return path
    folder = _steps_folder(path)
    if not folder.exists():
        raise UserError(f"no checkpoint in {path}: it is neither a work directory nor a saved step")
    steps = saved_steps(folder)
    for step in reversed(steps):
        reason = manifest.damage(folder / str(step), quick=True)
        if not reason:
            return folder / str(step)
        print(f"warning: {folder / str(step)} is damaged: {reason}", file=sys.stderr)
    if steps:
        raise UserError(f"no good checkpoint is left in {folder}")
    raise UserError(f"no complete checkpoint in {folder} yet")


def load_meta(step_folder: epath.PathLike) -> Meta:
    """Reads what a saved step says about itself.

    Raises:
      UserError: the folder is no saved step, or of a newer format.
    """
    folder = epath.Path(step_folder).absolute()
    try:
        meta = manifest.described(folder)
        tokenizer = manifest.described(folder, "tokenizer")
        version = meta["format_version"]
        if version not in READABLE_VERSIONS:
            raise UserError(
                f"{folder} has format {version}, this version reads "
                f"{', '.join(map(str, READABLE_VERSIONS))}"
            )
        files = tokenizer.get("files", {})
        for name in files:  # it becomes a path again where it is exported
            if not is_tokenizer_file(name):
                raise UserError(f"{folder} holds a file {name!r}, which is no tokenizer's")
        return Meta(
            config=from_json(meta["config"]),
            step=meta["step"],
            data_fingerprint=meta["data_fingerprint"],
            positions=meta.get("positions", []),  # absent before streaming
            device_kind=meta.get("device_kind", ""),
            eval_loss=meta.get("eval_loss"),  # these two, before manifests
            fingerprint=meta.get("fingerprint", {}),
            rewinds=meta.get("rewinds", []),  # absent before them
            base=meta.get("base", {}),  # absent before LoRA
            base_context=meta.get("base_context", 0),
            tokenizer_model=base64.b64decode(tokenizer["sentencepiece"]),
            tokenizer_files={name: base64.b64decode(file) for name, file in files.items()},
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} is not a readable checkpoint: {error}") from error


def load_adapters(step_folder: epath.PathLike, config: Config) -> Any:
    """Reads the adapters of a saved step into NumPy.

    Raises:
      UserError: as `load_params`.
    """
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: one, abstract_state(config).params)
    return jax.device_get(load_params(step_folder, config, shardings))


def load_params(step_folder: epath.PathLike, config: Config, shardings: Any) -> Any:
    """Reads only the weights of a saved step onto the mesh of `shardings`.

    Raises:
      UserError: the saved arrays are not those of this config.
      DamagedCheckpoint: they cannot be read, or are not what was saved.
    """
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state(config).params,
        shardings,
    )
    folder = epath.Path(step_folder).absolute()
    return restore_items(folder, {"params": target}, lambda found: found)["params"]


def verify(path: epath.Path) -> bool:
    """Reads every file of the steps in a work directory (or of one step) and prints how they are.

    Returns:
      Whether no step is damaged.

    Raises:
      UserError: there is no step.
    """
    if (path / "params").exists() or (path / manifest.NAME).exists():
        folders = [path]
    else:
        folder = _steps_folder(path)
        steps = saved_steps(folder)
        if not steps:
            raise UserError(f"no checkpoint in {path}: it has no saved step")
        folders = [folder / str(step) for step in steps]
    good = True
    for folder in folders:
        reason = manifest.damage(folder)
        if reason:
            print(f"{folder}: damaged: {reason}")
            good = False
        elif manifest.is_unverified(folder):
            print(f"{folder}: unverified, saved by a version without a manifest")
        else:
            print(f"{folder}: good, every file is as it was written")
    return good


def main() -> int:
    """The command; the flag is defined below."""
    if not _VERIFY.value:
        raise UserError("--verify is missing; try --verify=runs/tiny")
    return 0 if verify(epath.Path(_VERIFY.value)) else 1


if __name__ == "__main__":
    _VERIFY = flags.DEFINE_string(
        "verify",
        None,
        "Work directory, or the folder of one step: reads every file, and says which steps are "
        "good, damaged (exit status 1) or unverified.",
    )
    cli.run(main, __doc__)
