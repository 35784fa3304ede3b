"""Turns raw text into token shards: `python -m llama_jax.prepare --config=FILE --output=DIR`.

Example:
  python -m llama_jax.prepare --config=configs/tiny.py --output=shards \\
      --config.data.source='books/*.txt,web/*.jsonl.gz'
  python -m llama_jax.prepare --config=configs/tiny.py --output=shards \\
      --config.data.source='web=web/*.parquet; books=books/*.txt.zst'
  python -m llama_jax.prepare --config=configs/7b.py --output=chat --config.train.seq_len=2048 \\
      --config.data.source=sharegpt.json --config.data.template=vicuna \\
      --config.data.packing=best_fit --config.data.tokenizer=tokenizer.model
  python -m llama_jax.prepare --verify=shards

SIGTERM, SIGHUP and Ctrl-C end the command at once, with status 143, 129 and 130. However it ends,
running the same command again continues after the parts that are done.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from llama_jax.cli import command
from llama_jax.data.prepare import job
from llama_jax.data.shards import layout
from llama_jax.errors import UserError

_CONFIG = command.config_flag()
_OUTPUT = command.path_flag("output", None, "New or empty folder for the shards; local or gs://.")
_VERIFY = command.path_flag(
    "verify", None, "Verify the shards in this folder, of one or several sources, and exit."
)
_RESTART = flags.DEFINE_bool(
    "restart", False, "Delete the unfinished work in --output and start again."
)
_BEAM = flags.DEFINE_string(
    "beam", None, "Run on Apache Beam with these pipeline options, such as '--runner=DirectRunner'."
)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Makes signals raise KeyboardInterrupt(number) inside the block; a second signal kills.

    A signal that was ignored when the command started, as by nohup, stays ignored.
    """

    def stop(number: int, _: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> int | None:
    """Runs the command."""
    if _VERIFY.value:
        damaged = []
        for folder in layout.source_folders(_VERIFY.value).values():
            began = time.monotonic()
            found = layout.verify(folder)
            seconds = time.monotonic() - began
            damaged += [str(folder / name) for name in found]
            if not found:
                gigabytes = sum(layout.file_sizes(folder).values()) / 1e9
                speed = f"{gigabytes:,.3f} GB at {gigabytes / seconds:.2f} GB/s"
                print(f"{folder}: every file is as the manifest says ({speed})")
        if damaged:
            raise UserError(f"damaged or missing: {', '.join(damaged)}")
        return None
    if not _OUTPUT.value:
        raise UserError("--output is missing; try --output=shards")
    config = command.load_config(_CONFIG)
    try:
        with _stoppable():
            job.prepare(config, _OUTPUT.value, beam_options=_BEAM.value, restart=_RESTART.value)
    except KeyboardInterrupt as stopped:
        number = signal.Signals(*stopped.args or (signal.SIGINT,))
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(
                f"{number.name}: stopped; run the same command again to continue", file=sys.stderr
            )
        return 128 + number
    return None


if __name__ == "__main__":
    command.run(main, __doc__)
