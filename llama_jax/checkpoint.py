"""Checkpoints that describe themselves: weights, optimiser, data position, config and tokenizer.

A saved step is the folder `checkpoints/N/` with five orbax items: `params`, `optimizer` (step
counter and moments), `skips` (what was skipped, see skips.py), `meta` (JSON: resolved config, data
fingerprint, versions) and `tokenizer` (JSON: the tokenizer's file). Whoever needs only the weights
reads only them.
"""

import base64
import dataclasses
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

import llama_jax
from llama_jax.config import Config, from_json
from llama_jax.errors import UserError
from llama_jax.skips import Skips, no_skips
from llama_jax.step import TrainState, abstract_state

# Bump when a saved step can no longer be read as before. 2: with `skips`.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
CHECKPOINTS = "checkpoints"
# Parts of a layer that are stored by themselves; of smaller ones there would be too many.
LAYER_BYTES = 2**20


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
    """

    config: Config
    step: int
    data_fingerprint: str
    tokenizer_model: bytes
    positions: list[list[int]] = dataclasses.field(default_factory=list)
    tokenizer_files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    device_kind: str = ""


class Checkpointer:
    """Saves the states of one run, asynchronously, and keeps the newest few.

    Saving returns as soon as the arrays are copied to the host; a folder gets its final name only
    when it is complete. As a context manager it waits for that on the way out, whatever else fails:
    a run that ends in an error must not lose the save before it.
    """

    def __init__(self, workdir: epath.PathLike, config: Config) -> None:
        self._directory = (epath.Path(workdir) / CHECKPOINTS).absolute()
        self._config = config
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.train.keep_checkpoints,
                cleanup_tmp_directories=True,
                # Orbax would save the very first step it is offered; when to save is the loop's.
                should_save_fn=lambda step, last: True,
            ),
        )

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        # Without waiting, orbax also names a step that is still being written.
        self.wait()
        return self._manager.latest_step()

    def folder(self, step: int) -> epath.Path:
        """Where `step` is, or would be."""
        return self._directory / str(step)

    def save(self, state: TrainState, meta: Meta) -> None:
        """Starts saving `state`.

        Raises:
          UserError: this save or the one before it could not be written (disk full, read-only).
        """
        meta = dataclasses.replace(meta, device_kind=jax.devices()[0].device_kind)
        description, tokenizer = _to_json(meta)
        optimizer = {"step": state.step, "opt_state": state.opt_state}
        self._check_space(state)
        try:
            self._manager.save(
                meta.step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params, save_args=_by_layer(state.params)),
                    optimizer=ocp.args.StandardSave(optimizer),
                    skips=ocp.args.StandardSave(state.skips.to_dict()),
                    meta=ocp.args.JsonSave(description),
                    tokenizer=ocp.args.JsonSave(tokenizer),
                ),
            )
        except (OSError, ValueError) as error:
            raise self._save_error(error) from error

    def _check_space(self, state: TrainState) -> None:
        """Fails before anything is written, where the disk tells that it cannot hold the state."""
        if "://" in str(self._directory):
            return
        shards = (s for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards)
        needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0)
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            error = OSError(
                f"it takes {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free"
            )
            raise self._save_error(error)

    def wait(self) -> None:
        """Blocks until all saves are on disk.

        Raises:
          UserError: one of them failed.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._save_error(error) from error

    def close(self) -> None:
        """Waits, and frees orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _save_error(self, error: Exception) -> UserError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        return UserError(
            f"saving to {self._directory} failed: {reason}; earlier checkpoints are untouched. "
            "Free some space or choose another --workdir, then run the same command to go on"
        )

    def restore(self, step: int, shardings: Any) -> TrainState:
        """Reads the state of `step` onto the mesh of `shardings` (a `TrainState` of shardings).

        Raises:
          UserError: the saved arrays are not those of this config.
        """
        abstract = abstract_state(self._config)
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            shardings,
        )
        optimizer = {"step": target.step, "opt_state": target.opt_state}
        items = {"params": target.params, "optimizer": optimizer}
        if (self.folder(step) / "skips").exists():  # not before format 2
            items["skips"] = target.skips.to_dict()
        restored = _restore(self.folder(step), items)
        if "skips" in items:
            skips = Skips(**restored["skips"])
        else:
            skips = jax.jit(no_skips, out_shardings=shardings.skips)()
        return TrainState(params=restored["params"], **restored["optimizer"], skips=skips)


def _by_layer(params: Any) -> Any:
    """Stacks of layers are stored in parts of one layer, so that `convert` reads them one by one.

    Orbax would store what a device holds as one part, which can only be read as a whole.
    """

    def save_args(path: Any, x: jax.Array) -> ocp.SaveArgs:
        stacked = path[0].key == "layers"
        part = x.addressable_shards[0].data.nbytes // x.shape[0]
        return ocp.SaveArgs(shard_axes=(0,) if stacked and part >= LAYER_BYTES else ())

    return jax.tree.map_with_path(save_args, params)


def _to_json(meta: Meta) -> tuple[dict[str, Any], dict[str, Any]]:
    """The items `meta` and `tokenizer` of a step."""
    description = {
        "format_version": FORMAT_VERSION,
        "step": meta.step,
        "data_fingerprint": meta.data_fingerprint,
        "positions": meta.positions,
        "device_kind": meta.device_kind,
        "config": meta.config.to_json(),
        "versions": {"llama_jax": llama_jax.__version__, "jax": jax.__version__},
    }
    files = {name: base64.b64encode(file).decode() for name, file in meta.tokenizer_files.items()}
    tokenizer = {"sentencepiece": base64.b64encode(meta.tokenizer_model).decode(), "files": files}
    return description, tokenizer


def save_meta(folder: epath.Path, meta: Meta) -> None:
    """Writes what a step says about itself, into a folder whose arrays come from elsewhere."""
    for name, item in zip(("meta", "tokenizer"), _to_json(meta), strict=True):
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
            writer.save((folder / name).absolute(), item)


def _restore(folder: epath.Path, items: dict[str, Any]) -> dict[str, Any]:
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
                reason = str(error.__cause__ or error).strip().splitlines()[0]
                raise UserError(
                    f"{folder / name} cannot be read: {reason}; "
                    f"move {folder} away to go on from the step before"
                ) from error
    return found


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


def find_step(checkpoint: epath.PathLike) -> epath.Path:
    """The step folder that a user means: the newest of a work directory, or the folder itself.

    Raises:
      UserError: there is none.
    """
    path = epath.Path(checkpoint)
    if (path / "params").exists():
        return path
    folder = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    if not folder.exists():
        raise UserError(f"no checkpoint in {path}: it is neither a work directory nor a saved step")
    steps = [entry for entry in folder.iterdir() if entry.name.isdigit()]
    if not steps:
        raise UserError(f"no complete checkpoint in {folder} yet")
    return max(steps, key=lambda entry: int(entry.name))


def load_meta(step_folder: epath.PathLike) -> Meta:
    """Reads what a saved step says about itself.

    Raises:
      UserError: the folder is no saved step, or of a newer format.
    """
    folder = epath.Path(step_folder).absolute()
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        try:
            meta = reader.restore(folder / "meta")
            tokenizer = reader.restore(folder / "tokenizer")
            version = meta["format_version"]
            if version not in READABLE_VERSIONS:
                raise UserError(
                    f"{folder} has format {version}, this version reads "
                    f"{', '.join(map(str, READABLE_VERSIONS))}"
                )
            return Meta(
                config=from_json(meta["config"]),
                step=meta["step"],
                data_fingerprint=meta["data_fingerprint"],
                positions=meta.get("positions", []),  # absent before streaming
                device_kind=meta.get("device_kind", ""),
                tokenizer_model=base64.b64decode(tokenizer["sentencepiece"]),
                tokenizer_files={
                    name: base64.b64decode(file)
                    for name, file in tokenizer.get("files", {}).items()
                },
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{folder} is not a readable checkpoint: {error}") from error


def load_params(step_folder: epath.PathLike, config: Config, shardings: Any) -> Any:
    """Reads only the weights of a saved step onto the mesh of `shardings`.

    Raises:
      UserError: the saved arrays are not those of this config.
    """
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state(config).params,
        shardings,
    )
    return _restore(epath.Path(step_folder).absolute(), {"params": target})["params"]
