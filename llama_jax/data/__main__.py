"""Shows prepared data: the mixture, rows as the model sees them, and histograms.

Example:
  python -m llama_jax.data --show=runs/tiny
  python -m llama_jax.data --show=shards --step=1000 --rows=8 --plot=data.png
  python -m llama_jax.data --show=shards --config=configs/tiny.py \\
      --config.data.mixture='web=0.8,books=0.2' --config.train.seq_len=128
"""

import os
import shutil
import sys
from collections.abc import Iterable

from absl import flags
from etils import epath

from llama_jax.cli import command
from llama_jax.data.show import plot as plot_lib
from llama_jax.data.show import summary
from llama_jax.data.show.rows import Screen
from llama_jax.errors import UserError

_SHOW = command.path_flag(
    "show", None, "Folder of token shards, folder of several sources, or work directory of train."
)
_CONFIG = command.config_flag()
_STEP = flags.DEFINE_integer(
    "step", 0, "First step whose sequences are shown.", lower_bound=0, upper_bound=10**12
)
_ROWS = flags.DEFINE_integer(
    "rows", 3, "Number of sequences to show.", lower_bound=0, upper_bound=10**6
)
_LINES = flags.DEFINE_integer(
    "lines", 12, "Maximum number of lines to show of one document; 0: all.", lower_bound=0
)
_PLOT = command.path_flag(
    "plot", None, "PNG file for the histograms; default: plots/data.png in the folder."
)


def _print(lines: Iterable[str]) -> bool:
    """Prints lines; returns False if the reader has closed the pipe, as `| head` does."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        # Otherwise Python would print an error when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def main() -> None:
    """Runs the command."""
    if not _SHOW.value:
        raise UserError("--show is missing; try --show=runs/tiny")
    config = command.load_config(_CONFIG) if _CONFIG.value is not None else None
    prepared = summary.open_prepared(_SHOW.value, config)
    screen = Screen(
        width=min(shutil.get_terminal_size((100, 0)).columns, 120),
        lines=_LINES.value,
        colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ,
    )
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # for an ASCII terminal
    reads = _print([summary.summary(prepared, _STEP.value, screen), ""])
    reads = reads and _print(summary.show_rows(prepared, _STEP.value, _ROWS.value, screen))
    path = epath.Path(_PLOT.value or prepared.folder / "plots" / "data.png")
    try:
        plot_lib.plot(prepared, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; choose another file with --plot"
        ) from error
    if reads:
        _print(["", f"histograms  {path}"])


if __name__ == "__main__":
    command.run(main, __doc__)
