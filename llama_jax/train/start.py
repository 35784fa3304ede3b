"""The first state of a run: from the newest undamaged checkpoint, given weights or random ones."""

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
    """Returns the config, with the tokenizer of the initial weights if it names no other one.

    If the weights are gone, a resumed run takes the tokenizer that its work directory holds.

    Raises:
      UserError: the weights do not exist, or have no tokenizer. A newly trained tokenizer would not
        match their token ids.
    """
    data = config.data
    if not config.init_from or data.tokenizer or data.source == "synthetic":
        return config
    tokenizer = tokenizer_file(config.init_from)
    kept = workdir / "tokenizer.model"  # `run` writes it
    if not tokenizer and not data.path and kept.exists():
        tokenizer = str(kept)
    if not tokenizer and not data.path:  # prepared shards have their own
        init_place(config.init_from)
        raise UserError(
            f"init_from={config.init_from} has no tokenizer in a known format; name one with "
            "--config.data.tokenizer=FILE"
        )
    return dataclasses.replace(config, data=dataclasses.replace(data, tokenizer=tokenizer))


def open_weights(config: Config, workdir: epath.Path) -> Source | None:
    """Opens the initial weights before the data are prepared; None if the run needs no weights.

    This reads and checks only their headers. Without adapters, only a new run needs the weights: a
    resumed run continues even if they are gone.

    Raises:
      UserError: see `open_init`.
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
    """Restores the newest undamaged checkpoint of the work directory, or makes a new state.

    Args:
      compiled: the step, with the shardings of the state.
      saver: the checkpointer of the work directory.
      data: the data of the run; a stream is moved to the position of the state.
      config: the config of the run.
      weights: the result of `open_weights`.

    Returns:
      The state, and the description that a checkpoint of it would have.

    Raises:
      UserError: the checkpoint is unreadable, or belongs to another run or other data.
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
    if weights is None and config.init_from:  # `open_weights` found checkpoints, which are gone
        weights = open_init(config)
    state = first_state(compiled, config, weights)
    agreed("")  # reads differ in time, and a collective waits only for a limited time
    base = fingerprint(state.frozen) if config.lora.rank else {}
    context = weights.description.config.train.seq_len if weights is not None else 0
    return state, fresh_meta(compiled, data, base, context)


def _go_on(
    step: int, folder: epath.Path, data: TrainingData, config: Config, parts: Parts
) -> StepMeta:
    """Checks that a run may continue from a step, and moves the data there; returns its `meta`."""
    if not (folder / "optimizer").exists():
        raise UserError(
            f"checkpoint {folder} has weights but no optimiser state (it was converted "
            "from elsewhere), and training cannot resume from it; start another run with "
            f"--config.init_from=ckpt:{folder.parent.parent}"
        )
    saved = load_meta(folder, parts.architecture.name)
    changes = check_checkpoint(saved, folder, config, data, parts)
    index, count = jax.process_index(), jax.process_count()
    if saved.positions and len(saved.positions) != count:
        raise UserError(
            f"checkpoint {folder} has data positions of {len(saved.positions)} process(es), and "
            f"this job has {count}: a run on streamed data resumes only with the same number"
        )
    data.train.start_at(step, saved.positions[index] if saved.positions else [], index, count)
    say(f"resume  from step {step}")
    if changed := record_changes(folder.parent.parent, step, changes):
        say(f"        {changed}")
    return saved


def fresh_meta(
    compiled: CompiledStep, data: TrainingData, base: dict[str, int], context: int = 0
) -> StepMeta:
    """Returns the description of the state before the first step, for a checkpoint.

    Args:
      compiled: the step, with its config and parts.
      data: the data of the run.
      base: fingerprints of the frozen base of adapters; empty without adapters.
      context: maximum sequence length of the initial weights, in tokens; 0: they are random.
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
    """Makes the state before the first step.

    Args:
      compiled: the step, with the shardings of the state.
      config: the config of the run.
      weights: the initial weights, or with adapters their base; None: random weights.

    Raises:
      UserError: see `load_init`; or the architecture's arrays do not match those of the weights.
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
            f"init_from={config.init_from} has the arrays of a LLaMA, but "
            f"{compiled.parts.architecture.name} has others: {', '.join(lacking)}"
        )
    if config.lora.rank:
        frozen = load_init(weights, config, compiled.state_shardings.frozen)
        return dataclasses.replace(state, frozen=frozen)
    places = traverse_util.flatten_dict(compiled.state_shardings.params, sep="/")
    random = traverse_util.flatten_dict(state.params, sep="/")
    # Arrays that only this architecture has stay random; the others are freed before the read.
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
    """Adds the frozen base to a restored state with adapters.

    Args:
      state: the restored state.
      weights: the weights to read the base from.
      compiled: the step, with the shardings of the state.
      config: the config of the run.
      saved: fingerprints of the base that the adapters were trained on.
      folder: the folder of the saved step, for errors.

    Raises:
      UserError: see `load_init` and `check_base`.
    """
    base = load_init(weights, config, compiled.state_shardings.frozen)
    agreed("")  # reads differ in time, and a collective waits only for a limited time
    check_base(saved, base, config, folder)
    return dataclasses.replace(state, frozen=base)
