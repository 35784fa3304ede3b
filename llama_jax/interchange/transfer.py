"""Writes weights from a source to a new folder in another format: all of them, or nothing."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath

from llama_jax.checkpoint import saved_step
from llama_jax.checkpoint.fingerprint import changed_arrays
from llama_jax.errors import UserError
from llama_jax.files import is_object_store
from llama_jax.interchange import formats, peft
from llama_jax.interchange.ckpt import CkptTarget, write_adapters
from llama_jax.interchange.formats import Description, Source, Target
from llama_jax.interchange.hf import DTYPES, HfTarget
from llama_jax.interchange.merged_adapters import base_fingerprint
from llama_jax.interchange.meta import MetaTarget
from llama_jax.interchange.opening import open_adapters, saved_adapters
from llama_jax.model.cost import parameter_count


@contextlib.contextmanager
def _all_or_nothing(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields a temporary folder next to `folder`; gives it its final name when it is complete."""
    if folder.exists():
        raise UserError(f"{folder} exists; choose another target, or move it away")
    partial = folder.parent / f"{folder.name}.partial"
    if partial.exists():  # left by a conversion that was killed
        partial.rmtree()
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise


def export_adapters(
    checkpoint: epath.Path, target: epath.PathLike, base: str = "", dtype: str = ""
) -> Description:
    """Writes the adapters of a checkpoint in PEFT's format; returns their description.

    Args:
      checkpoint: a work directory, or the folder of one step.
      target: folder that must not exist.
      base: FORMAT:DIR of their base, which is compared with the base in training; empty: the base
        is not read, and the export names the place of the base in training.
      dtype: dtype of the tensors; empty: float32.

    Raises:
      UserError: the checkpoint has no adapters, or they have another base; the target exists.
    """
    step = saved_step.find_step(checkpoint, pass_over=False)
    if base:
        described, adapters, origin = open_adapters("ckpt", step, base)
        found = base_fingerprint(origin, described.config)
        changed = changed_arrays(saved_step.load_meta(step).base, found)
        formats.refuse_other_base(changed, described.config, step)
    else:
        described, adapters = saved_adapters(step)
    with _all_or_nothing(epath.Path(target)) as partial:
        peft.write(partial, described.config, adapters, dtype or "float32")
    return described


def import_adapters(folder: epath.Path, target: epath.PathLike, base: str = "") -> Description:
    """Writes adapters in PEFT's format as a checkpoint; returns their description.

    Args:
      folder: folder of PEFT's files.
      target: folder that must not exist.
      base: FORMAT:DIR of their base; empty: the place that the adapters name.

    Raises:
      UserError: see `open_adapters`; the target exists.
    """
    described, adapters, origin = open_adapters("peft", folder, base)
    with _all_or_nothing(epath.Path(target)) as partial:
        prints = base_fingerprint(origin, described.config)
        write_adapters(partial, described, adapters, prints)
    return described


def convert(source: Source, kind: str, folder: epath.PathLike, dtype: str = "") -> Description:
    """Writes `source` to `folder` in the format `kind`; all of it, or nothing.

    Args:
      source: opened weights.
      kind: hf, meta or ckpt.
      folder: folder that must not exist.
      dtype: dtype of the target's weights; empty: as in the source. A checkpoint always holds
        float32.

    Returns:
      The description of the target. Prints a line for each file that could not be read or written.

    Raises:
      UserError: the folder exists, or the weights cannot be read, cast or written.
    """
    description, folder = source.description, epath.Path(folder)
    dtype = "float32" if kind == "ckpt" else dtype or description.dtype
    with _all_or_nothing(folder) as partial:
        _check_space(
            partial, description, np.dtype(DTYPES[dtype]).itemsize * (2 if kind == "meta" else 1)
        )
        target: Target
        if kind == "ckpt":
            target = CkptTarget(partial, description)
        else:
            make: Callable[..., Target] = HfTarget if kind == "hf" else MetaTarget
            target = make(partial, description, dtype)
        for path, layer in formats.paths_and_layers(description.config.model):
            target.write(path, layer, source.read(path, layer))
        target.close()
    for note in (*description.notes, *getattr(target, "notes", ())):
        print(f"note  {folder}: {note}")
    return dataclasses.replace(description, dtype=dtype)


def _check_space(folder: epath.Path, description: Description, itemsize: int) -> None:
    if is_object_store(folder):
        return
    needed = parameter_count(description.config.model) * itemsize
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent}: writing takes up to {needed / 1e9:.2f} GB, the disk has "
            f"{free / 1e9:.2f} GB free"
        )
