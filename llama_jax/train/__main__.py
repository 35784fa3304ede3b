"""Trains a LLaMA, or resumes the run in the work directory.

Example:
  python -m llama_jax.train --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=200
  python -m llama_jax.train --config=configs/tiny.py --workdir=runs/tiny --config.train.steps=400 \\
      --accept_changes=train.steps
"""

import os
import time

import jax
from absl import flags

from llama_jax.cli import command
from llama_jax.errors import UserError
from llama_jax.hardware import xla_flags
from llama_jax.parallel.cluster import join_job
from llama_jax.parallel.multihost import Stopped, say
from llama_jax.train.run import run

_CONFIG = command.config_flag()
_WORKDIR = command.path_flag(
    "workdir", None, "Folder of the run: config, checkpoints, metrics, plots; local or gs://."
)
_XLA_PRESET = flags.DEFINE_string("xla_preset", xla_flags.AUTO, xla_flags.HELP)
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "Seconds to wait for the other processes of the job.", lower_bound=1
)
_ACCEPT_CHANGES = flags.DEFINE_list(
    "accept_changes",
    [],
    "Fields, separated by commas, in which the run in the work directory may go on with other "
    "values, such as train.steps,optim.peak_lr; a group, such as optim, is all of its fields. The "
    "change is recorded in changes.jsonl. Fields that cannot change the result, such as "
    "train.grad_accum, need no flag.",
)
_STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    0,
    "Exit status after a stop by a signal such as SIGTERM, when the run is saved but not "
    "finished. A launcher that restarts failed jobs needs a status other than 0.",
    lower_bound=0,
    upper_bound=255,
)
_DAMAGED_STATUS = flags.DEFINE_integer(
    "damaged_status",
    74,
    "Exit status of a finished run that skipped a damaged checkpoint on the way; not 0, so that "
    "somebody checks the disk. launch/retry.sh does not restart after 74.",
    lower_bound=0,
    upper_bound=255,
)


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX has another cache set."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "llama_jax", "xla"))


def main() -> int:
    """Runs the command; returns its exit status."""
    if not _WORKDIR.value:
        raise UserError("--workdir is missing; try --workdir=runs/tiny")
    began = time.monotonic()
    run_config = command.load_config(_CONFIG)
    chosen = xla_flags.use_preset(_XLA_PRESET.value)
    means = join_job(_START_TIMEOUT.value)
    if means:
        say(f"start   {jax.process_count()} processes, found by {means}")
    if chosen.tpu:
        say(f"flags   {chosen}")
    use_compilation_cache()
    try:
        outcome = run(run_config, _WORKDIR.value, began, accept=_ACCEPT_CHANGES.value)
    except Stopped as signal_name:
        say(f"\n{signal_name}: stopped, nothing to save; run the same command again to continue")
        return _STOPPED_STATUS.value
    if not outcome.finished:
        return _STOPPED_STATUS.value
    status = _DAMAGED_STATUS.value if outcome.passed_over else 0
    if status:
        say(
            f"exit status {status}: trained to the end, but a damaged checkpoint was skipped, "
            "see above; --damaged_status sets this status"
        )
    return status


if __name__ == "__main__":
    command.run(main, __doc__)
