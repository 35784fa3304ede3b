"""Verifies checkpoints: reads every file of each saved step.

Example:
  python -m llama_jax.checkpoint --verify=runs/tiny
"""

from etils import epath

from llama_jax.checkpoint.saved_step import check_steps
from llama_jax.cli import command
from llama_jax.errors import UserError

_VERIFY = command.path_flag(
    "verify",
    None,
    "Work directory, or the folder of one step. Reads every file and prints which steps are good "
    "and which are damaged; exits with status 1 if one is damaged.",
)


def main() -> int:
    """Verifies steps; returns the exit status, 1 if a step is damaged."""
    if not _VERIFY.value:
        raise UserError("--verify is missing; try --verify=runs/tiny")
    good = True
    for folder, reason in check_steps(epath.Path(_VERIFY.value)):
        if reason:
            print(f"{folder}: damaged: {reason}")
            good = False
        else:
            print(f"{folder}: good, every file is as it was written")
    return 0 if good else 1


if __name__ == "__main__":
    command.run(main, __doc__)
