"""Converts weights between Hugging Face's format, Meta's, and our checkpoints.

FORMAT is hf (safetensors, config.json, tokenizer), meta (consolidated.*.pth, params.json), ckpt (a
work directory, or the folder of one step) or peft (adapters: adapter_model.safetensors,
adapter_config.json). Pickles of torch (meta, pytorch_model.bin, adapter_model.bin) need
`pip install '.[meta]'`; hf and peft are written as safetensors. One array of one layer is in memory
at a time. The target is written beside its place, as TARGET.partial, and gets its name when it is
complete; a target that exists is refused.

A checkpoint of a run with adapters (config.lora) is merged with the base that it was trained on,
and adapters of peft with theirs; between ckpt and peft they stay adapters. To go to peft they need
no base: one that --base names is compared with theirs.

A checkpoint holds float32; hf, meta and peft keep the source's dtype, unless --dtype says another.

For a SentencePiece model, hf gets a tokenizer.json with the same ids, or a line says why not
(`pip install '.[hf]'` has the library that checks it).

Example:
  python -m llama_jax.convert --source=hf:Llama-3.2-1B --target=ckpt:runs/llama3_2_1b
  python -m llama_jax.convert --source=ckpt:runs/tiny --target=hf:exports/tiny --dtype=bfloat16
  python -m llama_jax.convert --source=meta:llama-2-7b --target=hf:Llama-2-7b --context=4096
  python -m llama_jax.convert --source=ckpt:runs/lora --target=peft:exports/adapters
  python -m llama_jax.convert --source=peft:adapters --base=hf:Llama-2-7b --target=ckpt:runs/lora
"""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from llama_jax import checkpoint as checkpoint_lib
from llama_jax import cli
from llama_jax.cost import parameter_count
from llama_jax.errors import UserError
from llama_jax.files import is_object_store
from llama_jax.fingerprint import difference
from llama_jax.interchange import formats, peft
from llama_jax.interchange.ckpt import CkptSource, CkptTarget, describe, write_adapters
from llama_jax.interchange.formats import Description, Source, Target
from llama_jax.interchange.hf import DTYPES, HfSource, HfTarget
from llama_jax.interchange.loading import check_model
from llama_jax.interchange.merged import MergedSource, base_fingerprint, refuse_other_base
from llama_jax.interchange.meta import MetaSource, MetaTarget
from llama_jax.interchange.padded import with_rows

FORMATS = ("hf", "meta", "ckpt", "peft")


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
      UserError: they are missing, damaged, or disagree with their config; they are no adapters,
        but a base is given.
    """
    if not folder.exists():
        raise UserError(f"{folder} does not exist")
    if base and kind in ("hf", "meta"):
        raise no_adapters(folder)
    if kind == "meta":
        return MetaSource(folder, context)
    if kind == "hf":
        return HfSource(folder)
    if kind == "peft":
        described, adapters, origin = open_adapters(kind, folder, base)
        # As PEFT merges: into the weights as they are.
        config = described.config
        whole = dataclasses.replace(config.lora, base_dtype="float32")
        config = dataclasses.replace(config, lora=whole)
        return MergedSource(origin, adapters, config, {}, described)
    step = checkpoint_lib.find_step(folder, pass_over=False)
    meta = checkpoint_lib.load_meta(step)
    if not meta.config.lora.rank:
        if base:
            raise no_adapters(step)
        return CkptSource(step)
    described, adapters, origin = open_adapters(kind, step, base)
    return MergedSource(origin, adapters, described.config, meta.base, described)


def open_base(place: str, adapters: epath.PathLike) -> Source:
    """Opens the weights below adapters.

    Args:
      place: FORMAT:DIR of them.
      adapters: what to call these in an error.

    Raises:
      UserError: there is nothing, or as `open_source`.
    """
    kind, folder = parse_place(place, "base")
    if not folder.exists():
        raise UserError(f"{folder}, the base of {adapters}, is not here; say where: --base=hf:DIR")
    return open_source(kind, folder)


def open_adapters(kind: str, folder: epath.Path, base: str = "") -> tuple[Description, Any, Source]:
    """Adapters in NumPy, what is known of them, and the source of the weights below them.

    Args:
      kind: ckpt or peft.
      folder: of a saved step, or of PEFT's files.
      base: FORMAT:DIR of these weights; empty: where the adapters say.

    Raises:
      UserError: adapters or base cannot be read, or do not fit each other.
    """
    if kind == "ckpt":
        described, adapters = saved_adapters(folder, base)
        origin = open_base(described.config.init_from, folder)
        origin = with_rows(origin, described.config.model.vocab_size)
        check_model(origin, described.config)
        return described, adapters, origin
    lora, name = peft.read_config(folder)
    place = base or f"hf:{name}"
    origin = open_base(place, folder)
    config = dataclasses.replace(origin.description.config, lora=lora, init_from=place)
    described = dataclasses.replace(origin.description, config=config)
    return described, peft.read(folder, config.model, lora), origin


def saved_adapters(step: epath.Path, base: str = "") -> tuple[Description, Any]:
    """Adapters of a saved step in NumPy, and what is known of them; their base is not read.

    Args:
      step: its folder.
      base: FORMAT:DIR that takes the place of where the base was in training.

    Raises:
      UserError: it has none.
    """
    meta = checkpoint_lib.load_meta(step)
    if not meta.config.lora.rank:
        raise UserError(f"{step} has no adapters: its run trained all weights")
    described = describe(step, meta)
    config = dataclasses.replace(described.config, init_from=base or meta.config.init_from)
    described = dataclasses.replace(described, config=config)
    return described, checkpoint_lib.load_adapters(step, config)


def no_adapters(folder: epath.Path) -> UserError:
    """The error of a base that is given for weights without adapters."""
    return UserError(f"--base is of the weights below adapters, and {folder} has no adapters")


@contextlib.contextmanager
def _whole(folder: epath.Path) -> Iterator[epath.Path]:
    """A folder that is written beside its place, and gets its name when it is complete."""
    if folder.exists():
        raise UserError(f"{folder} exists; choose another target, or move it away")
    partial = folder.parent / f"{folder.name}.partial"
    if partial.exists():  # of a conversion that was killed
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
    """Adapters of a checkpoint in PEFT's format.

    Args:
      checkpoint: a work directory, or the folder of one step.
      target: folder that must not exist.
      base: FORMAT:DIR of their base, which is compared with the one that they were trained on;
        empty: where it was in training, and it is not read.
      dtype: of the numbers; empty: float32.

    Raises:
      UserError: there are no adapters, or for another base; the target exists.
    """
    step = checkpoint_lib.find_step(checkpoint, pass_over=False)
    if base:
        described, adapters, origin = open_adapters("ckpt", step, base)
        found = base_fingerprint(origin, described.config)
        changed = difference(checkpoint_lib.load_meta(step).base, found)
        refuse_other_base(changed, described.config, step)
    else:
        described, adapters = saved_adapters(step)
    with _whole(epath.Path(target)) as partial:
        peft.write(partial, described.config, adapters, dtype or "float32")
    return described


def import_adapters(folder: epath.Path, target: epath.PathLike, base: str = "") -> Description:
    """Adapters of PEFT's format as a checkpoint.

    Raises:
      UserError: as `open_adapters`; the target exists.
    """
    described, adapters, origin = open_adapters("peft", folder, base)
    with _whole(epath.Path(target)) as partial:
        prints = base_fingerprint(origin, described.config)
        write_adapters(partial, described, adapters, prints)
    return described


def convert(source: Source, kind: str, folder: epath.PathLike, dtype: str = "") -> Description:
    """Writes `source` to `folder` in the format `kind`; all of it, or nothing.

    Args:
      source: opened weights.
      kind: hf, meta or ckpt.
      folder: that must not exist.
      dtype: of the target's weights; empty: the source's. A checkpoint always holds float32.

    Returns:
      What was written. What could not be read or written is printed, a line each.

    Raises:
      UserError: the folder exists, or the weights cannot be read, cast or written.
    """
    description, folder = source.description, epath.Path(folder)
    dtype = "float32" if kind == "ckpt" else dtype or description.dtype
    with _whole(folder) as partial:
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


def main() -> None:
    """The command; flags are defined below."""
    source_kind, source_folder = parse_place(_SOURCE.value, "source")
    target_kind, target_folder = parse_place(_TARGET.value, "target")
    if target_kind == "ckpt" and _DTYPE.value:
        raise UserError("a checkpoint holds float32; --dtype is for hf, meta and peft")
    if _CONTEXT.value and source_kind != "meta":
        raise UserError("--context is for meta, whose params.json does not tell it")
    start = time.perf_counter()
    if target_kind == "peft" or (source_kind, target_kind) == ("peft", "ckpt"):
        if source_kind not in ("peft", "ckpt") or source_kind == target_kind:
            raise UserError(f"{source_kind} has no adapters for {target_kind}")
        if target_kind == "peft":
            written = export_adapters(source_folder, target_folder, _BASE.value, _DTYPE.value or "")
        else:
            written = import_adapters(source_folder, target_folder, _BASE.value)
        lora = written.config.lora
        print(f"wrote {target_folder}: adapters of rank {lora.rank} for {lora.targets}")
        return
    source = open_source(source_kind, source_folder, _CONTEXT.value, _BASE.value)
    written = convert(source, target_kind, target_folder, _DTYPE.value or "")
    model = written.config.model
    count = parameter_count(model)
    print(
        f"wrote {target_folder}: {count:,} parameters, {written.dtype}, "
        f"{math.ceil(count * np.dtype(DTYPES[written.dtype]).itemsize / 1e6):,} MB, "
        f"in {time.perf_counter() - start:.1f} s"
    )
    if target_kind == "ckpt":
        print(f"sample  python -m llama_jax.generate --checkpoint={target_folder} --prompt=TEXT")


if __name__ == "__main__":
    _SOURCE = cli.path_flag("source", None, "What to read, as FORMAT:DIR.")
    _TARGET = cli.path_flag("target", None, "What to write, as FORMAT:DIR; must not exist.")
    _DTYPE = flags.DEFINE_enum(
        "dtype",
        None,
        list(DTYPES),
        "Of an hf, meta or peft target's weights; default: the source's.",
    )
    _CONTEXT = flags.DEFINE_integer(
        "context",
        0,
        "Longest sequence in tokens, for a meta source; 0: by the family's habit.",
        lower_bound=0,
    )
    _BASE = cli.path_flag(
        "base",
        "",
        "Weights below the adapters of a source, as FORMAT:DIR; default: where these say it was.",
    )
    cli.run(main, __doc__)
