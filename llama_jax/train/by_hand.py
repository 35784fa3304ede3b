"""Functions for notebooks: save, restore, evaluate and sample a state.

`run.run` does all of this for a whole run. Call all functions inside `jax.set_mesh`, on all
processes of a job.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from llama_jax.checkpoint.checkpointer import Checkpointer
from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.checkpoint.saved_step import find_step, load_meta, restore_items
from llama_jax.config import Config
from llama_jax.data.source import BatchSource
from llama_jax.data.training_data import TrainingData
from llama_jax.errors import UserError
from llama_jax.inference.decode import Sampling, generate
from llama_jax.inference.generation import complete
from llama_jax.interchange.opening import open_init
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.train.resume import changed_parts
from llama_jax.train.start import fresh_meta, with_frozen_base
from llama_jax.train.step import CompiledStep, TrainState


def save_state(
    workdir: epath.PathLike,
    compiled: CompiledStep,
    state: TrainState,
    data: TrainingData | None = None,
) -> epath.Path:
    """Saves a state as a checkpoint, and waits until it is complete.

    The checkpoint is in `workdir/checkpoints`, where `run.run`, `generate` and `convert` look for
    it. `train.keep_checkpoints` limits how many checkpoints are kept.

    Args:
      workdir: a work directory; it is created if it does not exist.
      compiled: the step that made the state.
      state: the state to save.
      data: the data that the state was trained on, whose tokenizer is saved too; None: not known.

    Returns:
      The folder of the saved step.

    Raises:
      UserError: the state cannot be saved, for example because the disk is full.
    """
    data = TrainingData(BatchSource()) if data is None else data
    base = fingerprint(state.frozen) if state.frozen is not None else {}
    context = _initial_context(compiled.config)
    meta, step = fresh_meta(compiled, data, base, context), int(state.step)
    with Checkpointer(workdir, compiled.config) as saver:
        seen = data.train.seen(step)
        saver.save(state.to_items(), dataclasses.replace(meta, step=step, seen=seen))
    return saver.folder(step)


@functools.lru_cache(maxsize=8)  # a notebook saves often, and opening reads headers of all files
def _initial_context(config: Config) -> int:
    """Returns the maximum sequence length of the initial weights, in tokens; 0: they are random."""
    return open_init(config).description.config.train.seq_len if config.init_from else 0


def restore_state(checkpoint: epath.PathLike, compiled: CompiledStep) -> TrainState:
    """Reads a state onto the mesh of `compiled`, and checks that it is what was saved, bit for bit.

    Args:
      checkpoint: a work directory, whose newest undamaged step is read, or the folder of a step.
      compiled: the step to continue with; its mesh may differ from that of the saved state.

    Raises:
      UserError: the checkpoint does not exist, is damaged, was trained with other parts, or has
        other arrays in its model or optimiser.
    """
    folder = find_step(checkpoint)
    saved = load_meta(folder, compiled.parts.architecture.name)
    for kind, (was, now) in changed_parts(saved.parts, compiled.parts.names()).items():
        raise UserError(f"{folder} was trained with other parts: {kind} is {was}, now {now}")
    targets = compiled.placed_state(base=False).to_items()
    state = TrainState.from_items(restore_items(folder, targets))
    config = compiled.config
    if not config.lora.rank:
        return state
    return with_frozen_base(state, open_init(config), compiled, config, saved.base, folder)


def mean_loss(
    compiled: CompiledStep, state: TrainState, batches: Iterable[Mapping[str, Any]]
) -> float:
    """Computes the mean cross-entropy per token, in nats, over batches.

    Args:
      compiled: the step.
      state: the state whose weights are evaluated.
      batches: global batches, such as `source.batches(range(global_batch), 0, 10)`; see `step`.

    Raises:
      UserError: the weights of all targets are 0, or there are no batches.
    """
    total = weight = 0.0
    for batch in batches:
        sums = jax.device_get(compiled.evaluate(compiled.weights(state), dict(batch)))
        total, weight = total + float(sums[0]), weight + float(sums[1])
    if not weight:
        raise UserError("there is nothing to evaluate: all targets of the batches have weight 0")
    return total / weight


def sample(
    compiled: CompiledStep,
    state: TrainState,
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    sampling: Sampling | None = None,
) -> list[str]:
    """Continues texts with the weights of a state.

    Args:
      compiled: the step.
      state: the state whose weights are used.
      prompts: the texts to continue.
      tokenizer: the tokenizer of the model.
      sampling: how tokens are sampled, and how many; None: the defaults of `Sampling`.

    Returns:
      Each prompt with its continuation.

    Raises:
      UserError: a prompt is empty or longer than `train.seq_len`, or the mesh shards the sequence.
    """
    model, weights, context = _to_decode(compiled, state)
    chosen = Sampling() if sampling is None else sampling
    return complete(model, weights, tokenizer, prompts, chosen, context=context)


def sample_ids(
    compiled: CompiledStep,
    state: TrainState,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    end_ids: Sequence[int] = (),
) -> list[list[int]]:
    """Continues sequences of token ids with the weights of a state.

    Args:
      compiled: the step.
      state: the state whose weights are used.
      prompts: sequences of at least one token id.
      sampling: how tokens are sampled, and how many; None: the defaults of `Sampling`.
      end_ids: tokens after which a sequence ends.

    Returns:
      The new ids of each prompt.

    Raises:
      UserError: a prompt is empty or longer than `train.seq_len`, or the mesh shards the sequence.
    """
    model, weights, context = _to_decode(compiled, state)
    chosen = Sampling() if sampling is None else sampling
    ends = tuple(end_ids) or (-1,)  # not a token id, so that no sequence ends early
    return generate(model, weights, prompts, chosen, context=context, eos_id=ends)


def _to_decode(compiled: CompiledStep, state: TrainState) -> tuple[Any, Any, int]:
    """Returns the model, the weights for its decoder, and the maximum sequence length in tokens."""
    config = compiled.config
    return config.model, compiled.weights(state), config.train.seq_len
