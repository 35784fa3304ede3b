"""The first state of a run: from the newest undamaged checkpoint, given weights or random ones."""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection

import jax
from etils import epath
from flax import traverse_util

from llama_jax.checkpoint import manifest
from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.retention import saved_steps
from llama_jax.checkpoint.saved_step import (
    CHECKPOINTS,
    DamagedCheckpoint,
    Items,
    StepMeta,
    load_meta,
    restore_items,
)
from llama_jax.config import Config
from llama_jax.data.training_data import TrainingData
from llama_jax.errors import UserError
from llama_jax.interchange.formats import Source, changes_of_model
from llama_jax.interchange.loading import check_base, load_init
from llama_jax.interchange.opening import init_place, open_init, tokenizer_file
from llama_jax.parallel.multihost import agreed, say
from llama_jax.parameters import PARAMETERS, present
from llama_jax.train.changes import ACCEPTABLE, OTHER_DATA, record_changes
from llama_jax.train.origin import Origin, branch_folder
from llama_jax.train.parts import Parts
from llama_jax.train.resume import check_checkpoint
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


def open_weights(
    config: Config, workdir: epath.Path, accept: Collection[str] = ()
) -> Source | None:
    """Opens the initial weights before the data are prepared; None if the run needs no weights.

    This reads and checks only their headers. Without adapters, only a new run needs the weights: a
    resumed run continues even if they are gone.

    Args:
      config: the config of the run.
      workdir: its work directory.
      accept: fields of the model that may differ, such as `model.rope_theta`.

    Raises:
      UserError: see `open_init`.
    """
    began = saved_steps(workdir / CHECKPOINTS) or config.branch_from
    reads = config.init_from and (config.lora.rank or not began)
    return open_init(config.at(0), accept) if reads else None


def initial_state(
    compiled: CompiledStep,
    saver: Checkpointer,
    data: TrainingData,
    config: Config,
    weights: Source | None,
    origin: Origin | None = None,
) -> tuple[TrainState, StepMeta]:
    """Restores the newest undamaged checkpoint of the work directory, or makes a new state.

    Args:
      compiled: the step, with the shardings of the state.
      saver: the checkpointer of the work directory.
      data: the data of the run; a stream is moved to the position of the state.
      config: the config of the run.
      weights: the result of `open_weights`.
      origin: what the run goes on from, see `find_origin`; None: nothing may have changed.

    Returns:
      The state, and the description that a checkpoint of it would have.

    Raises:
      UserError: the checkpoint is unreadable, or belongs to another run or other data.
    """
    origin = Origin(config, config) if origin is None else origin
    while (step := saver.newest_good_step()) is not None:
        folder = saver.folder(step)
        saved = _go_on(folder, folder.parent.parent, data, origin, compiled.parts)
        read = functools.partial(saver.restore, step)
        try:
            return _restored(read, folder, saved, compiled, data, config, weights)
        except DamagedCheckpoint as error:
            saver.mark_damaged(step, str(error))
    if config.branch_from:
        return _branched(compiled, saver, data, config, weights, origin)
    return _new_state(compiled, saver, data, config, weights, origin)


def _restored(
    read: Callable[[Items], Items],
    folder: epath.Path,
    saved: StepMeta,
    compiled: CompiledStep,
    data: TrainingData,
    config: Config,
    weights: Source | None,
) -> tuple[TrainState, StepMeta]:
    """Reads the state of a saved step.

    Args:
      read: reads the arrays of the step, given their shapes, dtypes and shardings.
      folder: the folder of the step.
      saved: the description of the step.
      compiled: the step of the optimiser, with the shardings of the state.
      data: the data of the run.
      config: the config of the run.
      weights: the base of adapters.

    Raises:
      UserError: the saved arrays or the base do not match.
      DamagedCheckpoint: the step cannot be read, or differs from what was saved; on all processes.
    """
    target = compiled.placed_state(base=False)
    state = TrainState.from_items(read(target.to_items()))
    if config.lora.rank and weights is not None:
        state = with_frozen_base(state, weights, compiled, config, saved.base, folder)
    meta = fresh_meta(compiled, data, saved.base, saved.base_context, config)
    carried = {name: getattr(saved, name) for name in ("step", "rewinds", "eval_loss", "seen")}
    return state, dataclasses.replace(meta, **carried)


def _branched(
    compiled: CompiledStep,
    saver: Checkpointer,
    data: TrainingData,
    config: Config,
    weights: Source | None,
    origin: Origin,
) -> tuple[TrainState, StepMeta]:
    """Reads the state of the step that a branch begins with; see `initial_state`.

    Raises:
      UserError: the step is damaged, or is of another model or other data.
    """
    folder = branch_folder(config.branch_from)
    if reason := agreed(manifest.first_damage(folder, (jax.process_index(), jax.process_count()))):
        raise UserError(f"{folder} is damaged: {reason}; branch from another step")
    # A branch may change everything that is not another model or other text.
    may = [name for name in ACCEPTABLE if name == "data.mixture" or name not in OTHER_DATA]
    workdir = saver.folder(0).parent.parent
    origin = dataclasses.replace(origin, accept=(*origin.accept, *may, "branch_from"))
    if load_meta(folder, compiled.parts.architecture.name).step == config.train.steps:
        raise UserError(
            f"{folder} has made all train.steps={config.train.steps} steps, so a branch from it "
            "has no step to make; train.steps counts the steps of the trunk, too: raise it with "
            "--config.train.steps=N, or branch from an earlier step"
        )
    saved = _go_on(folder, workdir, data, origin, compiled.parts)
    read = functools.partial(restore_items, folder)
    return _restored(read, folder, saved, compiled, data, config, weights)


def _new_state(
    compiled: CompiledStep,
    saver: Checkpointer,
    data: TrainingData,
    config: Config,
    weights: Source | None,
    origin: Origin,
) -> tuple[TrainState, StepMeta]:
    """Makes the state before the first step; see `initial_state`."""
    index, count, initial = jax.process_index(), jax.process_count(), origin.initial
    position: list[int] = []
    # With known epochs, `data.start` has them by now.
    if initial is not None and config.data.start == "auto":
        known = initial.data_fingerprint == data.fingerprint
        if known and len(initial.positions) == count:
            position = initial.positions[index]
        elif known:
            say(
                f"data    {config.init_from} was trained on these data, but does not say how far: "
                "the run begins at their start, see data.start"
            )
    data.train.start_at(0, position, index, count)
    if weights is None and config.init_from:  # `open_weights` found checkpoints, which are gone
        weights = open_init(config.at(0), origin.accept)
    if weights is not None and (changes := changes_of_model(weights, config.at(0))):
        say(record_changes(saver.folder(0).parent.parent, 0, changes))
    state = first_state(compiled, config, weights)
    agreed("")  # reads differ in time, and a collective waits only for a limited time
    base = fingerprint(state.frozen) if config.lora.rank else {}
    context = weights.description.config.train.seq_len if weights is not None else 0
    meta = fresh_meta(compiled, data, base, context, config)
    return state, dataclasses.replace(meta, seen=initial.seen if initial is not None else {})


def _go_on(
    folder: epath.Path, workdir: epath.Path, data: TrainingData, origin: Origin, parts: Parts
) -> StepMeta:
    """Checks that a run may continue from a step, and moves the data there; returns its `meta`.

    Args:
      folder: the folder of the step.
      workdir: the work directory of the run that continues.
      data: the data of the run.
      origin: says what was asked for and what may change.
      parts: the parts of the run.

    Raises:
      UserError: the run may not continue from this step.
    """
    if not (folder / "optimizer").exists():
        raise UserError(
            f"checkpoint {folder} has weights but no optimiser state (it was converted "
            "from elsewhere), and training cannot resume from it; start another run with "
            f"--config.init_from=ckpt:{folder.parent.parent}"
        )
    saved, config = load_meta(folder, parts.architecture.name), origin.asked
    changes = check_checkpoint(saved, folder, config, data, parts, origin.accepted(saved))
    index, count = jax.process_index(), jax.process_count()
    if saved.positions and len(saved.positions) != count:
        raise UserError(
            f"checkpoint {folder} has data positions of {len(saved.positions)} process(es), and "
            f"this job has {count}: a run on streamed data resumes only with the same number"
        )
    if saved.step > config.train.steps:
        raise UserError(
            f"checkpoint {folder} has made {saved.step} steps, more than train.steps="
            f"{config.train.steps}; to end there, branch from an earlier step into a new work "
            f"directory: --config.branch_from={folder.parent}/STEP"
        )
    data.train.start_at(saved.step, saved.positions[index] if saved.positions else [], index, count)
    own = folder.parent.parent == workdir
    say(f"resume  from step {saved.step}" if own else f"branch  from step {folder}")
    changes = origin.new_changes(changes)
    changes.pop("branch_from", None)
    branch = "" if own else os.fspath(folder)
    if changed := record_changes(workdir, max(saved.step, origin.step), changes, branch):
        say(f"        {changed}")
    return saved


def fresh_meta(
    compiled: CompiledStep,
    data: TrainingData,
    base: dict[str, int],
    context: int = 0,
    config: Config | None = None,
) -> StepMeta:
    """Returns the description of the state before the first step, for a checkpoint.

    Args:
      compiled: the step, with its config and parts.
      data: the data of the run.
      base: fingerprints of the frozen base of adapters; empty without adapters.
      context: maximum sequence length of the initial weights, in tokens; 0: they are random.
      config: the config of the whole run; None: that of the step.
    """
    return StepMeta(
        compiled.config if config is None else config,
        step=0,
        data_fingerprint=data.fingerprint,
        tokenizer_model=data.tokenizer.model_bytes if data.tokenizer else b"",
        tokenizer_files=data.files,
        base=base,
        base_context=context,
        parts=compiled.parts.names(),
        sources=data.sources,
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
    state = compiled.init(jax.random.key(config.at(0).train.seed))  # that of the first stage
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
