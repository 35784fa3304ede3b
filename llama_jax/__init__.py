"""llama_jax: LLaMA training in JAX and Flax, from a laptop to a pod.

A noun is a room (a package), a verb is a command: `python -m llama_jax.X` runs `X.py` or
`X/__main__.py`. A room imports only rooms above it in this list; `plan` imports only the step
and the optimizer of `train`.

  config.py     every field of a run, with its meaning and its check
  stages.py     the text that gives fields other values in some steps of a run
  parameters.py the arrays of a LLaMA: one table
  errors.py     UserError, and checks of values from users
  files.py      paths, small files, checksums
  hardware/     descriptions of machines: chips, topologies, compiler flags
  parallel/     mesh, sharding, the processes of a job
  model/        the LLaMA as pure functions
  text/         text to token ids and back
  data/         raw text to shards to batches; a command
  checkpoint/   saved steps; a command
  interchange/  weights in the formats of other programs
  inference/    generation and scoring with a loaded model
  train/        a run; a command
  plan/         the same step for a machine that you do not have; a command
  cli/          what commands share
  prepare.py, generate.py, evaluate.py, convert.py  commands

The names in `__all__` are what a notebook needs: `llama_jax.jit_step`, `llama_jax.run` and so on.
Each is imported when it is first used. Importing the package starts no device, opens no file and
imports neither JAX nor TensorFlow.
"""

import importlib
import sys
from typing import Any

__version__ = "0.1.0"

# Public names, and the modules that they come from.
_MODULES = {
    # A run, and its config.
    "run": "train.run",
    "Config": "config",
    "ModelConfig": "config",
    "MeshConfig": "config",
    "DataConfig": "config",
    "OptimConfig": "config",
    "TrainConfig": "config",
    "LoraConfig": "config",
    "UserError": "errors",
    # A step, and what a notebook does with its state.
    "make_mesh": "parallel.mesh",
    "jit_step": "train.step",
    "save_state": "train.by_hand",
    "restore_state": "train.by_hand",
    "mean_loss": "train.by_hand",
    "sample": "train.by_hand",
    "sample_ids": "train.by_hand",
    "Sampling": "inference.decode",
    "open_model": "inference.loaded_model",
    "logits": "model.llama",
    # What a researcher exchanges.
    "Parts": "train.parts",
    "next_token_loss": "train.parts",
    "Architecture": "model.llama",
    "Block": "model.llama",
    "Attention": "model.llama",
    "SwiGLU": "model.llama",
    "PARAMETERS": "parameters",
    "Parameter": "parameters",
    "parameter_table": "parameters",
    "BatchSource": "data.source",
    "TrainingData": "data.training_data",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names, too, for completion."""
    return sorted({*globals(), *__all__})


def _is_run_as_command() -> bool:
    """Returns whether this is the start of `python -m llama_jax.X`, not an import by a program."""
    # Python's documentation of -m: argv[0] is "-m" while the module is located, which imports us.
    names = (arg.removeprefix("-m") for arg in sys.orig_argv)
    return sys.argv[:1] == ["-m"] and any(name.startswith(f"{__name__}.") for name in names)


if _is_run_as_command():
    from llama_jax.cli import interrupts

    interrupts.end_quietly()
