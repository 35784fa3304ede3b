"""Opens weights by their name, FORMAT:DIR; adapters are opened with their base."""

import dataclasses
from collections.abc import Collection
from typing import Any

from etils import epath

from llama_jax.checkpoint import saved_step
from llama_jax.config import Config
from llama_jax.errors import UserError
from llama_jax.files import read_bytes
from llama_jax.interchange import peft
from llama_jax.interchange.ckpt import CkptSource, describe
from llama_jax.interchange.formats import Description, Source, check_model
from llama_jax.interchange.hf import TEKKEN, HfSource
from llama_jax.interchange.merged_adapters import MergedSource
from llama_jax.interchange.meta import MetaSource
from llama_jax.interchange.padded_vocabulary import with_padded_vocabulary
from llama_jax.model.weights import abstract_trained
from llama_jax.text.tiktoken_ranks import is_tiktoken
from llama_jax.text.tokenizer_files import ORIGINAL, choose_in

FORMATS = ("hf", "meta", "ckpt", "peft")


def parse_place(text: str | None, flag: str) -> tuple[str, epath.Path]:
    """Splits FORMAT:DIR into its two parts.

    Raises:
      UserError: `text` does not have that form.
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
      kind: one of `FORMATS`.
      folder: folder of the weights.
      context: context of a meta source in tokens, see `MetaSource`.
      base: FORMAT:DIR of the base of adapters; empty: the base that training used.

    Raises:
      UserError: the weights are missing, damaged, or do not match their config; or `base` is given
        and they have no adapters.
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
        # PEFT merges adapters into the original weights, without quantising them.
        config = described.config
        whole = dataclasses.replace(config.lora, base_dtype="float32")
        config = dataclasses.replace(config, lora=whole)
        return MergedSource(origin, adapters, config, {}, described)
    step = saved_step.find_step(folder, pass_over=False)
    meta = saved_step.load_meta(step)
    if not meta.of_weights.lora.rank:
        if base:
            raise no_adapters(step)
        return CkptSource(step)
    described, adapters, origin = open_adapters(kind, step, base)
    return MergedSource(origin, adapters, described.config, meta.base, described)


def open_base(config: Config, adapters: epath.PathLike) -> Source:
    """Opens the base of saved adapters; `loading.load_init` reads it.

    Args:
      config: config of the adapters' run; its `init_from` is the place of these weights.
      adapters: name of the adapters in an error.

    Raises:
      UserError: the place does not exist, or holds another model; see also `open_source`.
    """
    source = _open_below(config.init_from, adapters)
    check_model(source, config)
    return source


def _open_below(place: str, adapters: epath.PathLike) -> Source:
    """Opens the base of adapters; `place` is FORMAT:DIR."""
    kind, folder = parse_place(place, "base")
    if not folder.exists():
        raise UserError(f"{folder}, the base of {adapters}, does not exist; name it: --base=hf:DIR")
    return open_source(kind, folder)


def open_adapters(kind: str, folder: epath.Path, base: str = "") -> tuple[Description, Any, Source]:
    """Opens adapters and their base.

    Args:
      kind: ckpt or peft.
      folder: folder of a saved step, or of PEFT's files.
      base: FORMAT:DIR of the base of the adapters; empty: the place that the adapters name.

    Returns:
      The description of the adapters, the adapters in NumPy, and the source of their base.

    Raises:
      UserError: adapters or base cannot be read, or do not fit each other.
    """
    if kind == "ckpt":
        described, adapters = saved_adapters(folder, base)
        origin = open_base(described.config, folder)
        rows = described.config.model.vocab_size
        return described, adapters, with_padded_vocabulary(origin, rows)
    lora, name = peft.read_config(folder)
    place = base or f"hf:{name}"
    origin = _open_below(place, folder)
    config = dataclasses.replace(origin.description.config, lora=lora, init_from=place)
    described = dataclasses.replace(origin.description, config=config)
    return described, peft.read(folder, config.model, lora), origin


def saved_adapters(step: epath.Path, base: str = "") -> tuple[Description, Any]:
    """Reads the description and the adapters of a saved step, into NumPy; does not read the base.

    Args:
      step: folder of the step.
      base: FORMAT:DIR that replaces the place of the base in training; empty: keep it.

    Raises:
      UserError: the step has no adapters.
    """
    meta = saved_step.load_meta(step)
    if not meta.of_weights.lora.rank:
        raise UserError(f"{step} has no adapters: its run trained all weights")
    described = describe(step, meta)
    config = dataclasses.replace(described.config, init_from=base or meta.of_weights.init_from)
    described = dataclasses.replace(described, config=config)
    return described, saved_step.load_adapters(step, abstract_trained(config))


def no_adapters(folder: epath.Path) -> UserError:
    """Returns the error for a base that is given with weights without adapters."""
    return UserError(f"--base names the base of adapters, but {folder} has no adapters")


def open_init(config: Config, accept: Collection[str] = ()) -> Source:
    """Opens the weights that `config.init_from` names; `loading.load_init` reads them.

    They may have fewer rows for the vocabulary than the config's model: `load_init` adds rows.

    Args:
      config: the config of the run.
      accept: fields of the model that may differ, see `check_model`.

    Raises:
      UserError: the weights cannot be read, or belong to another model.
    """
    source = open_source(*init_place(config.init_from))
    check_model(source, config, accept)
    return source


def init_place(init_from: str) -> tuple[str, epath.Path]:
    """Returns format and folder of initial weights.

    Raises:
      UserError: the folder does not exist, or `init_from` is not FORMAT:DIR.
    """
    kind, folder = parse_place(init_from, "config.init_from")
    if not folder.exists():
        raise UserError(f"init_from={init_from}: {folder} does not exist")
    return kind, folder


def tokenizer_file(init_from: str) -> str:
    """Returns the path of the tokenizer of these weights, for `data.tokenizer`; '' without one.

    If there are several, takes the one that fits the model, as `convert` does. Returns the folder
    for a tokenizer that is made of several files (see `open_tokenizer`). Prefers a tokenizer.json
    to Llama 3's own format, which holds less information.

    Raises:
      UserError: every tokenizer has more ids than the model has rows, or one cannot be read.
    """
    kind, _, folder = init_from.partition(":")
    places = [epath.Path(folder)]
    if kind == "ckpt" and (places[0] / "params").exists():  # a step, as `open_tokenizer` reads it
        return folder if saved_step.load_meta(folder).tokenizer_model else ""
    if kind == "hf":
        chosen = choose_in(places[0])
        if chosen is not None:
            return str(places[0] / chosen.file) if chosen.plain else folder
        others = (places[0] / ORIGINAL, places[0] / TEKKEN)  # readers refuse the second by name
        return next((str(file) for file in others if file.exists()), "")
    if kind == "ckpt":
        return _kept_tokenizer(places[0])
    if kind == "meta":  # the first LLaMA and LLaMA-2 keep it next to the folders of the models
        places.append(places[0].parent)
    for place in places:
        model, described = place / "tokenizer.model", place / "tokenizer.json"
        if model.exists() and not (described.exists() and is_tiktoken(read_bytes(model))):
            return str(model)
        if described.exists():
            return str(described)
    return ""


def _kept_tokenizer(workdir: epath.Path) -> str:
    """Returns the tokenizer file of a run; '' without one.

    The file has no checksum and outlives the steps, so it is compared with the tokenizer of the
    newest step.

    Raises:
      UserError: the file differs from the tokenizer of the newest step.
    """
    file = workdir / "tokenizer.model"
    if not file.exists():
        return ""
    step = saved_step.find_step(workdir, pass_over=False)
    if read_bytes(file) != saved_step.load_meta(step).tokenizer_model:
        raise UserError(
            f"{file} is not the tokenizer of {step}: it is damaged or was replaced; name the step "
            f"itself, which holds its own copy: init_from=ckpt:{step}"
        )
    return str(file)
