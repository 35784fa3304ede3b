"""llama_jax: LLaMA training in JAX and Flax, from a laptop to a pod.

A noun is a room (a package), a verb is a command: `python -m llama_jax.X` runs `X.py` or
`X/__main__.py`. A room imports only rooms above it in this list, plan of train only the step
and its optimizer.

  config.py     every field of a run, with its meaning and its check
  parameters.py the arrays of a LLaMA: one table
  errors.py     UserError, and checks of what users write
  files.py      paths, small files, checksums
  hardware/     what machines are: chips, topologies, compiler flags
  parallel/     mesh, sharding, the processes of a job
  model/        the LLaMA as pure functions
  text/         text to token ids and back
  data/         raw text to shards to batches; a command
  checkpoint/   saved steps; a command
  interchange/  weights of others
  inference/    a loaded model writes or scores
  train/        a run; a command
  plan/         the same step for a machine that is not here; a command
  cli/          what commands share
  prepare.py, generate.py, evaluate.py, convert.py  commands

Importing the package starts no device, opens no file and imports no TensorFlow.
"""

import sys

__version__ = "0.1.0"


def _is_run_as_command() -> bool:
    """Whether this is the start of `python -m llama_jax.X`, and not an import by a program."""
    # Python's documentation of -m: argv[0] is "-m" while the module is located, which imports us.
    names = (arg.removeprefix("-m") for arg in sys.orig_argv)
    return sys.argv[:1] == ["-m"] and any(name.startswith(f"{__name__}.") for name in names)


if _is_run_as_command():
    from llama_jax.cli import interrupts

    interrupts.end_quietly()
