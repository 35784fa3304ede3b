"""The compiled step of each stage of a run, and the checks that all stages can be trained."""

import jax
from jax.sharding import Mesh

from llama_jax.config import Config
from llama_jax.errors import UserError
from llama_jax.parallel.sharding import check_batch
from llama_jax.train.step import CompiledStep, abstract_batch, jit_step


def same_program(one: Config, other: Config) -> bool:
    """Returns whether two configs have the same step; then they differ at most in their data."""
    groups = ("model", "optim", "train", "lora")
    return all(getattr(one, group) == getattr(other, group) for group in groups)


def step_of_stage(compiled: CompiledStep, config: Config) -> CompiledStep:
    """Returns the step for a stage of a run: the given one, if it computes the same.

    Args:
      compiled: the step of another stage.
      config: the config of the stage.
    """
    if same_program(compiled.config, config):
        return compiled
    return jit_step(config, compiled.batch_sharding.mesh, compiled.parts)


def check_batches(config: Config, mesh: Mesh) -> None:
    """Checks that the batches of each stage divide over the mesh.

    Raises:
      UserError: they do not; the message names the stage.
    """
    for stage in config.stages:
        train = stage.config.train
        try:
            check_batch(train.global_batch, train.seq_len, train.grad_accum, mesh)
        except UserError as error:
            raise _in_stage(config, stage.start, error) from error


def check_later_steps(compiled: CompiledStep, config: Config, step: int) -> None:
    """Traces the steps of the stages after the first one, so that none fails in days or weeks.

    For example, an attention backend may not support the sequence length of a stage.

    Args:
      compiled: the step of any stage.
      config: the config of the run.
      step: the number of steps that are made already.

    Raises:
      UserError: a stage cannot be trained; the message names it.
    """
    state = compiled.placed_state()
    for stage in config.stages:
        if not step < stage.start < config.train.steps:
            continue
        own = step_of_stage(compiled, stage.config)
        if own is compiled:
            continue
        try:
            jax.eval_shape(own.train, state, abstract_batch(stage.config))
        except UserError as error:
            raise _in_stage(config, stage.start, error) from error


def _in_stage(config: Config, start: int, error: UserError) -> UserError:
    where = f"the stage from step {start + 1} on: " if config.train.stages else ""
    return UserError(f"{where}{error}")
