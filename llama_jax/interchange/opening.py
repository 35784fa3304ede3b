"""Weights by name: what FORMAT:DIR names is opened, adapters with the base that they are for."""

import dataclasses
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
    step = saved_step.find_step(folder, pass_over=False)
    meta = saved_step.load_meta(step)
    if not meta.config.lora.rank:
        if base:
            raise no_adapters(step)
        return CkptSource(step)
    described, adapters, origin = open_adapters(kind, step, base)
    return MergedSource(origin, adapters, described.config, meta.base, described)


def open_base(config: Config, adapters: epath.PathLike) -> Source:
    """Opens the weights below saved adapters; `loading.load_init` reads them.

    Args:
      config: of the adapters' run, with the place of these weights as `init_from`.
      adapters: what to call the adapters in an error.

    Raises:
      UserError: there is nothing, or it is another model; or as `open_source`.
    """
    source = _open_below(config.init_from, adapters)
    check_model(source, config)
    return source


def _open_below(place: str, adapters: epath.PathLike) -> Source:
    """Opens the weights in FORMAT:DIR, which are below adapters."""
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
    """Adapters of a saved step in NumPy, and what is known of them; their base is not read.

    Args:
      step: its folder.
      base: FORMAT:DIR that takes the place of where the base was in training.

    Raises:
      UserError: it has none.
    """
    meta = saved_step.load_meta(step)
    if not meta.config.lora.rank:
        raise UserError(f"{step} has no adapters: its run trained all weights")
    described = describe(step, meta)
    config = dataclasses.replace(described.config, init_from=base or meta.config.init_from)
    described = dataclasses.replace(described, config=config)
    return described, saved_step.load_adapters(step, abstract_trained(config))


def no_adapters(folder: epath.Path) -> UserError:
    """The error of a base that is given for weights without adapters."""
    return UserError(f"--base is of the weights below adapters, and {folder} has no adapters")


def open_init(config: Config) -> Source:
    """Opens the weights that `config.init_from` names; `loading.load_init` reads them.

    They may have fewer rows for the vocabulary than the config's model: `load_init` adds these.

    Raises:
      UserError: they cannot be read, or are those of another model.
    """
    source = open_source(*init_place(config.init_from))
    check_model(source, config)
    return source


def init_place(init_from: str) -> tuple[str, epath.Path]:
    """Format and folder of these weights, which must be there."""
    kind, folder = parse_place(init_from, "config.init_from")
    if not folder.exists():
        raise UserError(f"init_from={init_from}: {folder} does not exist")
    return kind, folder


def tokenizer_file(init_from: str) -> str:
    """Where the tokenizer of these weights is, for `data.tokenizer`; empty if they have none.

    Of several the one that fits the model is taken, as by `convert`; a folder stands for one that
    is made of several files (see `open_tokenizer`). Llama 3's own format says less than a
    tokenizer.json.

    Raises:
      UserError: each has more ids than the model has rows, or one cannot be read.
    """
    kind, _, folder = init_from.partition(":")
    places = [epath.Path(folder)]
    if kind == "ckpt" and (places[0] / "params").exists():  # a step, as `open_tokenizer` reads it
        return folder if saved_step.load_meta(folder).tokenizer_model else ""
    if kind == "hf":
        chosen = choose_in(places[0])
        if chosen is not None:
            return str(places[0] / chosen.file) if chosen.plain else folder
        others = (places[0] / ORIGINAL, places[0] / TEKKEN)  # the second is refused by name
        return next((str(file) for file in others if file.exists()), "")
    if kind == "ckpt":
        return _kept_tokenizer(places[0])
    if kind == "meta":  # the first LLaMA and LLaMA-2 keep it beside the folders of the models
        places.append(places[0].parent)
    for place in places:
        model, described = place / "tokenizer.model", place / "tokenizer.json"
        if model.exists() and not (described.exists() and is_tiktoken(read_bytes(model))):
            return str(model)
        if described.exists():
            return str(described)
    return ""


def _kept_tokenizer(workdir: epath.Path) -> str:
    """The tokenizer beside a run's checkpoints, if it is still that of the newest.

    The file has no checksum, and outlives the steps; a run that goes on finds it by the same name.
    """
    file = workdir / "tokenizer.model"
    if not file.exists():
        return ""
    step = saved_step.find_step(workdir, pass_over=False)
    if read_bytes(file) != saved_step.load_meta(step).tokenizer_model:
        raise UserError(
            f"{file} is not the tokenizer of {step}: it is damaged or replaced; name the step "
            f"itself, which holds its own: init_from=ckpt:{step}"
        )
    return str(file)
