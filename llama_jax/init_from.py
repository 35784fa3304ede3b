"""The weights that a run begins with (`config.init_from`): to train on, or below adapters."""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from llama_jax.agreement import agreed
from llama_jax.checkpoint import CHECKPOINTS, find_step, load_meta
from llama_jax.config import Config
from llama_jax.convert import open_source, parse_place
from llama_jax.data.tokenizer_files import choose_in
from llama_jax.errors import UserError
from llama_jax.files import read_bytes
from llama_jax.fingerprint import difference, fingerprint
from llama_jax.interchange.formats import ORIGINAL, Source, is_tiktoken
from llama_jax.interchange.hf import TEKKEN
from llama_jax.interchange.loading import check_model, load
from llama_jax.interchange.merged import refuse_other_base
from llama_jax.interchange.padded import with_rows
from llama_jax.lora import freeze
from llama_jax.retention import saved_steps
from llama_jax.step import CompiledStep, TrainState, abstract_state
from llama_jax.weights import abstract_frozen


def open_init(config: Config) -> Source:
    """The source that `config.init_from` names, if it is the model of the config.

    It may have fewer rows than `model.vocab_size`; they are added (`interchange.padded`).

    Raises:
      UserError: it cannot be read, or holds another model.
    """
    source = with_rows(open_source(*_place(config.init_from)), config.model.vocab_size)
    check_model(source, config)
    return source


def _place(init_from: str) -> tuple[str, epath.Path]:
    """Format and folder of these weights, which must be there."""
    kind, folder = parse_place(init_from, "config.init_from")
    if not folder.exists():
        raise UserError(f"init_from={init_from}: {folder} does not exist")
    return kind, folder


def check_init(config: Config, workdir: epath.Path) -> None:
    """Checks the headers of the weights that a run will read, before it prepares its data.

    A run of all weights reads them only once: later they may be gone.

    Raises:
      UserError: as `open_init`.
    """
    began = saved_steps(workdir / CHECKPOINTS)
    if config.init_from and (config.lora.rank or not began):
        open_init(config)


def base_rows(config: Config) -> int:
    """Rows for the vocabulary that the weights of `config.init_from` have, before any are added.

    Raises:
      UserError: they cannot be read.
    """
    return open_source(*_place(config.init_from)).description.config.model.vocab_size


def base_context(config: Config) -> int:
    """Longest sequence, in tokens, that the weights of `config.init_from` are for; 0 without them.

    Raises:
      UserError: as `open_init`.
    """
    return open_init(config).description.config.train.seq_len if config.init_from else 0


def load_init(config: Config, shardings: Any) -> Any:
    """Reads the weights onto a mesh, one array of one layer after another.

    Args:
      config: with `init_from`.
      shardings: of the base where the config has adapters, else of the parameters.

    Returns:
      float32 parameters, or the base in its frozen form (`lora.freeze`).

    Raises:
      UserError: as `open_init`.
    """
    source = open_init(config)
    if config.lora.rank:
        targets = abstract_frozen(config)
        return load(source, targets, shardings, lambda path, x: freeze(path, x, config.lora))
    targets = abstract_state(config).params
    return load(source, targets, shardings, lambda _, x: x.astype(np.float32))


def check_base(saved: dict[str, int], base: Any, config: Config, folder: epath.Path) -> None:
    """Checks that the base is the one that a checkpoint's adapters were trained on.

    Args:
      saved: fingerprints of that one's arrays.
      base: as `load_init` gives it.
      config: which says where it is from.
      folder: of the checkpoint, for the error.

    Raises:
      UserError: it is another.
    """
    refuse_other_base(difference(saved, fingerprint(base)), config, folder)


def first_state(compiled: CompiledStep, config: Config) -> TrainState:
    """The state before the first step: random weights, or those that `config.init_from` names.

    Raises:
      UserError: as `open_init`.
    """
    state = compiled.init(jax.random.key(config.train.seed))
    if config.lora.rank:
        return dataclasses.replace(state, frozen=load_init(config, compiled.state_shardings.frozen))
    if config.init_from:
        state = dataclasses.replace(state, params=None)  # frees the random ones first
        params = load_init(config, compiled.state_shardings.params)
        state = dataclasses.replace(state, params=params)
    return state


def with_base(
    state: TrainState,
    compiled: CompiledStep,
    config: Config,
    saved: dict[str, int],
    folder: epath.Path,
) -> TrainState:
    """A state as it was saved, with the base below its adapters if it has some.

    Raises:
      UserError: as `load_init` and `check_base`.
    """
    if not config.lora.rank:
        return state
    base = load_init(config, compiled.state_shardings.frozen)
    agreed("")  # one may read for longer than another waits in a collective
    check_base(saved, base, config, folder)
    return dataclasses.replace(state, frozen=base)


def with_tokenizer(config: Config, workdir: epath.Path) -> Config:
    """The config, whose tokenizer is that of the weights if it names no other.

    A run of all weights goes on where they are gone: with the tokenizer that its folder has kept.

    Raises:
      UserError: they are not there, or have none, so that one would be trained, whose ids they do
        not know.
    """
    data = config.data
    if not config.init_from or data.tokenizer or data.source == "synthetic":
        return config
    tokenizer = tokenizer_file(config.init_from)
    kept = workdir / "tokenizer.model"  # as train writes it
    if not tokenizer and not data.path and kept.exists():
        tokenizer = str(kept)
    if not tokenizer and not data.path:  # prepared shards have their own
        _place(config.init_from)
        raise UserError(
            f"init_from={config.init_from} comes without a tokenizer that we read; name one by "
            "--config.data.tokenizer=FILE"
        )
    return dataclasses.replace(config, data=dataclasses.replace(data, tokenizer=tokenizer))


def tokenizer_file(init_from: str) -> str:
    """Where the tokenizer of these weights is, for `data.tokenizer`; empty if they have none.

    Of several the one that fits the model is taken, as by `convert`; a folder stands for one that
    is made of several files (see `Tokenizer.load`). Llama 3's own format says less than a
    tokenizer.json.

    Raises:
      UserError: each has more ids than the model has rows, or one cannot be read.
    """
    kind, _, folder = init_from.partition(":")
    places = [epath.Path(folder)]
    if kind == "ckpt" and (places[0] / "params").exists():  # a step, as `Tokenizer.load` reads it
        return folder if load_meta(folder).tokenizer_model else ""
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
    step = find_step(workdir, pass_over=False)
    if read_bytes(file) != load_meta(step).tokenizer_model:
        raise UserError(
            f"{file} is not the tokenizer of {step}: it is damaged or replaced; name the step "
            f"itself, which holds its own: init_from=ckpt:{step}"
        )
    return str(file)
