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
"""

import time

from absl import flags

from llama_jax import cli
from llama_jax.data import prepare, shard_folder
from llama_jax.errors import UserError


def main() -> None:
    """The command; flags are defined below."""
    if _VERIFY.value:
        damaged = []
        for folder in shard_folder.source_folders(_VERIFY.value).values():
            began = time.monotonic()
            found = shard_folder.verify(folder)
            seconds = time.monotonic() - began
            damaged += [str(folder / name) for name in found]
            if not found:
                gigabytes = sum(shard_folder.file_sizes(folder).values()) / 1e9
                speed = f"{gigabytes:,.3f} GB at {gigabytes / seconds:.2f} GB/s"
                print(f"{folder}: every file is as the manifest says ({speed})")
        if damaged:
            raise UserError(f"damaged or missing: {', '.join(damaged)}")
        return
    if not _OUTPUT.value:
        raise UserError("--output is missing; try --output=shards")
    prepare.prepare(cli.load_config(_CONFIG), _OUTPUT.value, beam_options=_BEAM.value)


if __name__ == "__main__":
    _CONFIG = cli.config_flag()
    _OUTPUT = cli.path_flag("output", None, "Folder to make; local or gs://.")
    _VERIFY = cli.path_flag(
        "verify", None, "Check the shards in this folder, of one source or several, and stop."
    )
    _BEAM = flags.DEFINE_string(
        "beam", None, "Run on Apache Beam with these options, such as '--runner=DirectRunner'."
    )
    cli.run(main, __doc__)
