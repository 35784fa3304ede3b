"""Converts weights between Hugging Face's format, Meta's, and our checkpoints.

FORMAT is hf (safetensors, config.json, tokenizer), meta (consolidated.*.pth, params.json; needs
`pip install '.[meta]'`) or ckpt (a work directory, or the folder of one step). One array of one
layer is in memory at a time. The target is written beside its place, as TARGET.partial, and gets
its name when it is complete; a target that exists is refused.

A checkpoint of a run with adapters (config.lora) is merged with the base that it was trained on.

A checkpoint holds float32; hf and meta keep the source's dtype, unless --dtype says another.

Example:
  python -m llama_jax.convert --source=hf:Llama-3.2-1B --target=ckpt:runs/llama3_2_1b
  python -m llama_jax.convert --source=ckpt:runs/tiny --target=hf:exports/tiny --dtype=bfloat16
  python -m llama_jax.convert --source=meta:llama-2-7b --target=hf:Llama-2-7b --context=4096
"""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable

import numpy as np
from absl import flags
from etils import epath

from llama_jax import checkpoint as checkpoint_lib
from llama_jax import cli
from llama_jax.errors import UserError
from llama_jax.interchange import formats
from llama_jax.interchange.ckpt import CkptSource, CkptTarget, describe
from llama_jax.interchange.formats import Description, Source, Target
from llama_jax.interchange.hf import DTYPES, HfSource, HfTarget
from llama_jax.interchange.loading import check_model
from llama_jax.interchange.merged import MergedSource
from llama_jax.interchange.meta import MetaSource, MetaTarget

FORMATS = ("hf", "meta", "ckpt")


def parse_place(text: str | None, flag: str) -> tuple[str, epath.Path]:
    """FORMAT:DIR as its two parts.

    Raises:
      UserError: it is not of that form.
    """
    kind, _, folder = (text or "").partition(":")
    if kind not in FORMATS or not folder:
        raise UserError(
            f"--{flag} must be FORMAT:DIR with FORMAT one of {', '.join(FORMATS)}, "
            f"such as hf:Llama-3.2-1B; got {text!r}"
        )
    return kind, epath.Path(folder)


def open_source(kind: str, folder: epath.Path, context: int = 0, base: str = "") -> Source:
    """Opens and checks weights of one of the formats; adapters are merged with their base.

    Args:
      kind: of `FORMATS`.
      folder: that holds them.
      context: of a meta source, see `MetaSource`.
      base: FORMAT:DIR of the weights below adapters; empty: where they were in training.

    Raises:
      UserError: they are missing, damaged, or disagree with their config.
    """
    if not folder.exists():
        raise UserError(f"{folder} does not exist")
    if kind == "meta":
        return MetaSource(folder, context)
    if kind == "hf":
        return HfSource(folder)
    step = checkpoint_lib.find_step(folder)
    meta = checkpoint_lib.load_meta(step)
    if not meta.config.lora.rank:
        return CkptSource(folder)
    place = base or meta.config.init_from
    config = dataclasses.replace(meta.config, init_from=place)
    origin = open_source(*parse_place(place, "base"))
    check_model(origin, config)
    adapters = checkpoint_lib.load_adapters(step, config)
    return MergedSource(origin, adapters, config, meta.base, describe(step, meta))


def convert(source: Source, kind: str, folder: epath.PathLike, dtype: str = "") -> Description:
    """Writes `source` to `folder` in the format `kind`; all of it, or nothing.

    Args:
      source: opened weights.
      kind: hf, meta or ckpt.
      folder: that must not exist.
      dtype: of the target's weights; empty: the source's. A checkpoint always holds float32.

    Returns:
      What was written.

    Raises:
      UserError: the folder exists, or the weights cannot be read, cast or written.
    """
    description, folder = source.description, epath.Path(folder)
    dtype = "float32" if kind == "ckpt" else dtype or description.dtype
    if folder.exists():
        raise UserError(f"{folder} exists; choose another target, or move it away")
    partial = folder.parent / f"{folder.name}.partial"
    if partial.exists():  # of a conversion that was killed
        partial.rmtree()
    partial.mkdir(parents=True)
    try:
        _check_space(
            partial, description, np.dtype(DTYPES[dtype]).itemsize * (2 if kind == "meta" else 1)
        )
        target: Target
        if kind == "ckpt":
            target = CkptTarget(partial, description)
        else:
            make: Callable[..., Target] = HfTarget if kind == "hf" else MetaTarget
            target = make(partial, description, dtype)
        for path, layer in formats.units(description.config.model):
            target.write(path, layer, source.read(path, layer))
        target.close()
        partial.rename(folder)
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise
    return dataclasses.replace(description, dtype=dtype)


def _check_space(folder: epath.Path, description: Description, itemsize: int) -> None:
    if "://" in str(folder):
        return
    needed = description.config.model.parameter_count() * itemsize
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder.parent}: writing takes up to {needed / 1e9:.2f} GB, the disk has "
            f"{free / 1e9:.2f} GB free"
        )


def main() -> None:
    """The command; flags are defined below."""
    source_kind, source_folder = parse_place(_SOURCE.value, "source")
    target_kind, target_folder = parse_place(_TARGET.value, "target")
    if target_kind == "ckpt" and _DTYPE.value:
        raise UserError("a checkpoint holds float32; --dtype is for hf and meta")
    if _CONTEXT.value and source_kind != "meta":
        raise UserError("--context is for meta, whose params.json does not tell it")
    start = time.perf_counter()
    source = open_source(source_kind, source_folder, _CONTEXT.value, _BASE.value)
    written = convert(source, target_kind, target_folder, _DTYPE.value or "")
    model = written.config.model
    count = model.parameter_count()
    print(
        f"wrote {target_folder}: {count:,} parameters, {written.dtype}, "
        f"{math.ceil(count * np.dtype(DTYPES[written.dtype]).itemsize / 1e6):,} MB, "
        f"in {time.perf_counter() - start:.1f} s"
    )
    if target_kind == "ckpt":
        print(f"sample  python -m llama_jax.generate --checkpoint={target_folder} --prompt=TEXT")


if __name__ == "__main__":
    _SOURCE = flags.DEFINE_string("source", None, "What to read, as FORMAT:DIR.")
    _TARGET = flags.DEFINE_string("target", None, "What to write, as FORMAT:DIR; must not exist.")
    _DTYPE = flags.DEFINE_enum(
        "dtype",
        None,
        list(DTYPES),
        "Of an hf or meta target's weights; default: the source's.",
    )
    _CONTEXT = flags.DEFINE_integer(
        "context",
        0,
        "Longest sequence in tokens, for a meta source; 0: by the family's habit.",
        lower_bound=0,
    )
    _BASE = flags.DEFINE_string(
        "base",
        "",
        "Weights below the adapters of a ckpt source, as FORMAT:DIR; default: where they were in "
        "training.",
    )
    cli.run(main, __doc__)
