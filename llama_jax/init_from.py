"""The weights that a run begins with (`config.init_from`): to train on, or below adapters."""

import dataclasses

import jax
from etils import epath

from llama_jax.agreement import agreed
from llama_jax.checkpoint import CHECKPOINTS
from llama_jax.config import Config
from llama_jax.errors import UserError
from llama_jax.interchange.loading import check_base, load_init
from llama_jax.interchange.opening import init_place, open_init, tokenizer_file
from llama_jax.retention import saved_steps
from llama_jax.step import CompiledStep, TrainState


def check_init(config: Config, workdir: epath.Path) -> None:
    """Checks the headers of the weights that a run will read, before it prepares its data.

    A run of all weights reads them only once: later they may be gone.

    Raises:
      UserError: as `open_init`.
    """
    began = saved_steps(workdir / CHECKPOINTS)
    if config.init_from and (config.lora.rank or not began):
        open_init(config)


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
        init_place(config.init_from)
        raise UserError(
            f"init_from={config.init_from} comes without a tokenizer that we read; name one by "
            "--config.data.tokenizer=FILE"
        )
    return dataclasses.replace(config, data=dataclasses.replace(data, tokenizer=tokenizer))
