"""Where a run begins: at the newest good checkpoint, at given weights, or at random ones."""

import dataclasses

import jax
from etils import epath

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.retention import saved_steps
from llama_jax.checkpoint.saved_step import CHECKPOINTS, DamagedCheckpoint, StepMeta, load_meta
from llama_jax.config import Config
from llama_jax.data.training_data import TrainingData
from llama_jax.errors import UserError
from llama_jax.interchange.loading import check_base, load_init
from llama_jax.interchange.opening import base_context, init_place, open_init, tokenizer_file
from llama_jax.parallel.multihost import agreed, say
from llama_jax.parallel.sharding import with_shardings
from llama_jax.train.resume import check_checkpoint, record_changes
from llama_jax.train.step import CompiledStep, TrainState, abstract_state


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


def check_init(config: Config, workdir: epath.Path) -> None:
    """Checks the headers of the weights that a run will read, before it prepares its data.

    A run of all weights reads them only once: later they may be gone.

    Raises:
      UserError: as `open_init`.
    """
    began = saved_steps(workdir / CHECKPOINTS)
    if config.init_from and (config.lora.rank or not began):
        open_init(config)


def initial_state(
    compiled: CompiledStep, saver: Checkpointer, data: TrainingData, config: Config
) -> tuple[TrainState, StepMeta]:
    """The newest good checkpoint of the work directory, or a fresh state.

    Returns:
      It, and what a checkpoint of it would say about itself.

    Raises:
      UserError: the checkpoint is unreadable, or of another run or other data.
    """
    step = saver.newest_good_step()
    process = (jax.process_index(), jax.process_count())
    if step is None:
        data.train.start_at(0, [], *process)
        state = first_state(compiled, config)
        agreed("")  # one may read for longer than another waits in a collective
        base = fingerprint(state.frozen) if config.lora.rank else {}
        return state, _meta(config, data, base, base_context(config))
    if not (saver.folder(step) / "optimizer").exists():
        raise UserError(
            f"checkpoint {saver.folder(step)} has weights but no optimiser state (it was converted "
            "from elsewhere), and training cannot go on from it; begin another run with it by "
            f"--config.init_from=ckpt:{saver.folder(step).parent.parent}"
        )
    saved = load_meta(saver.folder(step))
    changes = check_checkpoint(saved, saver.folder(step), config, data)
    if saved.positions and len(saved.positions) != process[1]:
        raise UserError(
            f"checkpoint {saver.folder(step)} has data positions of {len(saved.positions)} "
            f"process(es), and there are {process[1]}: streamed data can only go on with as many"
        )
    data.train.start_at(step, saved.positions[process[0]] if saved.positions else [], *process)
    say(f"resume  from step {step}")
    if changed := record_changes(saver.folder(step).parent.parent, step, changes):
        say(f"        {changed}")
    try:
        target = with_shardings(
            abstract_state(config), compiled.state_shardings.replace(frozen=None)
        )
        state = TrainState.from_items(saver.restore(step, target.to_items()))
    except DamagedCheckpoint as error:
        saver.mark_damaged(step, str(error))
        return initial_state(compiled, saver, data, config)
    state = with_frozen_base(state, compiled, config, saved.base, saver.folder(step))
    meta = _meta(config, data, saved.base, saved.base_context)
    loss = saved.eval_loss
    return state, dataclasses.replace(meta, step=step, rewinds=saved.rewinds, eval_loss=loss)


def _meta(config: Config, data: TrainingData, base: dict[str, int], context: int) -> StepMeta:
    """What a fresh state would say about itself."""
    return StepMeta(
        config,
        step=0,
        data_fingerprint=data.fingerprint,
        tokenizer_model=data.tokenizer.model_bytes if data.tokenizer else b"",
        tokenizer_files=data.files,
        base=base,
        base_context=context,
    )


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


def with_frozen_base(
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
