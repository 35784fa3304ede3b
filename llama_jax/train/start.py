"""Where a run begins: at the newest good checkpoint, at given weights, or at random ones."""

import dataclasses

import jax
from etils import epath
from flax import traverse_util

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.retention import saved_steps
from llama_jax.checkpoint.saved_step import CHECKPOINTS, DamagedCheckpoint, StepMeta, load_meta
from llama_jax.config import Config
from llama_jax.data.training_data import TrainingData
from llama_jax.errors import UserError
from llama_jax.interchange.formats import Source
from llama_jax.interchange.loading import check_base, load_init
from llama_jax.interchange.opening import init_place, open_init, tokenizer_file
from llama_jax.parallel.multihost import agreed, say
from llama_jax.parameters import PARAMETERS, present
from llama_jax.train.parts import Parts
from llama_jax.train.resume import check_checkpoint, record_changes
from llama_jax.train.step import CompiledStep, TrainState


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


def open_weights(config: Config, workdir: epath.Path) -> Source | None:
    """Opens the weights that a run reads, before it prepares its data; None: it reads none.

    This reads their headers and checks them. A run of all weights reads them only where it begins:
    later they may be gone.

    Raises:
      UserError: as `open_init`.
    """
    began = saved_steps(workdir / CHECKPOINTS)
    reads = config.init_from and (config.lora.rank or not began)
    return open_init(config) if reads else None


def initial_state(
    compiled: CompiledStep,
    saver: Checkpointer,
    data: TrainingData,
    config: Config,
    weights: Source | None,
) -> tuple[TrainState, StepMeta]:
    """The newest good checkpoint of the work directory, or a fresh state.

    Args:
      compiled: the step, which says where the arrays lie.
      saver: of the work directory.
      data: that the run trains on; a stream starts where the state is.
      config: of the run.
      weights: as `open_weights` gives them.

    Returns:
      It, and what a checkpoint of it would say about itself.

    Raises:
      UserError: the checkpoint is unreadable, or of another run or other data.
    """
    while (step := saver.newest_good_step()) is not None:
        folder = saver.folder(step)
        saved = _go_on(step, folder, data, config, compiled.parts)
        target = compiled.placed_state(base=False)
        try:
            state = TrainState.from_items(saver.restore(step, target.to_items()))
        except DamagedCheckpoint as error:
            saver.mark_damaged(step, str(error))
            continue
        if config.lora.rank and weights is not None:
            state = with_frozen_base(state, weights, compiled, config, saved.base, folder)
        meta = fresh_meta(compiled, data, saved.base, saved.base_context)
        loss = saved.eval_loss
        return state, dataclasses.replace(meta, step=step, rewinds=saved.rewinds, eval_loss=loss)
    data.train.start_at(0, [], jax.process_index(), jax.process_count())
    if weights is None and config.init_from:  # there was a step when the run started
        weights = open_init(config)
    state = first_state(compiled, config, weights)
    agreed("")  # one may read for longer than another waits in a collective
    base = fingerprint(state.frozen) if config.lora.rank else {}
    context = weights.description.config.train.seq_len if weights is not None else 0
    return state, fresh_meta(compiled, data, base, context)


def _go_on(
    step: int, folder: epath.Path, data: TrainingData, config: Config, parts: Parts
) -> StepMeta:
    """Checks that a run may go on from a step, and starts the data there; returns its `meta`."""
    if not (folder / "optimizer").exists():
        raise UserError(
            f"checkpoint {folder} has weights but no optimiser state (it was converted "
            "from elsewhere), and training cannot go on from it; begin another run with it by "
            f"--config.init_from=ckpt:{folder.parent.parent}"
        )
    saved = load_meta(folder, parts.architecture.name)
    changes = check_checkpoint(saved, folder, config, data, parts)
    index, count = jax.process_index(), jax.process_count()
    if saved.positions and len(saved.positions) != count:
        raise UserError(
            f"checkpoint {folder} has data positions of {len(saved.positions)} process(es), and "
            f"there are {count}: streamed data can only go on with as many"
        )
    data.train.start_at(step, saved.positions[index] if saved.positions else [], index, count)
    say(f"resume  from step {step}")
    if changed := record_changes(folder.parent.parent, step, changes):
        say(f"        {changed}")
    return saved


def fresh_meta(
    compiled: CompiledStep, data: TrainingData, base: dict[str, int], context: int = 0
) -> StepMeta:
    """Returns what a checkpoint says of the state before the first step.

    Args:
      compiled: the step, with its config and parts.
      data: of the run.
      base: fingerprints of the base below adapters; empty without them.
      context: longest sequence that the weights to begin with are for, in tokens; 0: random ones.
    """
    return StepMeta(
        compiled.config,
        step=0,
        data_fingerprint=data.fingerprint,
        tokenizer_model=data.tokenizer.model_bytes if data.tokenizer else b"",
        tokenizer_files=data.files,
        base=base,
        base_context=context,
        parts=compiled.parts.names(),
    )


def first_state(compiled: CompiledStep, config: Config, weights: Source | None) -> TrainState:
    """The state before the first step.

    Args:
      compiled: the step, which says where the arrays lie.
      config: of the run.
      weights: to begin with; None: random ones. Those of a run with adapters are their base.

    Raises:
      UserError: as `load_init`.
    """
    state = compiled.init(jax.random.key(config.train.seed))
    if weights is None:
        return state
    rows = compiled.parts.architecture.parameters
    lacking = [row.path for row in present(config.model) if row.path not in rows]
    if config.lora.rank:
        lacking += [path for path in rows if path not in PARAMETERS]
    if lacking:
        raise UserError(
            f"init_from={config.init_from} gives the arrays of a LLaMA, and "
            f"{compiled.parts.architecture.name} has others: {', '.join(lacking)}"
        )
    if config.lora.rank:
        frozen = load_init(weights, config, compiled.state_shardings.frozen)
        return dataclasses.replace(state, frozen=frozen)
    places = traverse_util.flatten_dict(compiled.state_shardings.params, sep="/")
    random = traverse_util.flatten_dict(state.params, sep="/")
    # What only this architecture has stays random; the rest is freed before it is read.
    params = {path: array for path, array in random.items() if path not in PARAMETERS}
    known = {path: place for path, place in places.items() if path in PARAMETERS}
    state, random = dataclasses.replace(state, params=None), {}
    loaded = load_init(weights, config, traverse_util.unflatten_dict(known, sep="/"))
    params |= traverse_util.flatten_dict(loaded, sep="/")
    return dataclasses.replace(state, params=traverse_util.unflatten_dict(params, sep="/"))


def with_frozen_base(
    state: TrainState,
    weights: Source,
    compiled: CompiledStep,
    config: Config,
    saved: dict[str, int],
    folder: epath.Path,
) -> TrainState:
    """A state as it was saved, with the base below its adapters.

    Args:
      state: whose adapters were trained on the base.
      weights: to read the base from.
      compiled: the step, which says where the arrays lie.
      config: of the run.
      saved: fingerprints of the base that they were trained on.
      folder: of the saved step, for errors.

    Raises:
      UserError: as `load_init` and `check_base`.
    """
    base = load_init(weights, config, compiled.state_shardings.frozen)
    agreed("")  # one may read for longer than another waits in a collective
    check_base(saved, base, config, folder)
    return dataclasses.replace(state, frozen=base)
