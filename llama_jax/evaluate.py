"""Evaluates a model: `python -m llama_jax.evaluate --checkpoint=DIR --text=FILES`.

Computes the perplexity on text files (of any kind that data.source takes, see llama_jax/config.py)
or on token shards; or runs tasks of lm-evaluation-harness: its own tasks, by name, or your
task files (`pip install 'llama_jax[eval]'`).

Example:
  python -m llama_jax.evaluate --checkpoint=runs/tiny --text='books/*.txt' --stride=128
  python -m llama_jax.evaluate --checkpoint=runs/tiny --shards=runs/tiny/data --json
  python -m llama_jax.evaluate --checkpoint=runs/7b --tasks=hellaswag,my_tasks/quiz.yaml \\
      --mesh=fsdp=2,tensor=4 --num_fewshot=0
"""

import sys

from absl import flags

from llama_jax.cli import command
from llama_jax.data.shards.layout import SPLITS
from llama_jax.errors import UserError
from llama_jax.inference.loaded_model import open_model
from llama_jax.inference.perplexity import evaluate, read_shards, read_texts, table, to_json

_CHECKPOINT = command.path_flag(
    "checkpoint",
    None,
    "Work directory (its newest step is used), or the folder of one step.",
)
_TEXT = flags.DEFINE_string(
    "text",
    None,
    "Text to score: files, folders or globs; 'NAME=FILES; NAME=FILES' for several sources.",
)
_TEXT_FIELD = flags.DEFINE_string(
    "text_field", "text", "Field of a JSON line, or column of a Parquet table, with the text."
)
_SHARDS = command.path_flag("shards", None, "Folder of token shards to score.")
_SPLIT = flags.DEFINE_enum("split", "validation", SPLITS, "Split of the shards.")
_TASKS = command.path_list_flag(
    "tasks", None, "Names of tasks of the harness, or paths of task files, separated by commas."
)
_NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Examples before each question; default: as the task says."
)
_STRIDE = flags.DEFINE_integer(
    "stride", None, "Tokens by which the window advances; default: half of the context."
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Windows or requests that are scored at the same time."
)
_LIMIT = flags.DEFINE_integer("limit", None, "Maximum number of documents of each source or task.")
_BASE = command.path_flag(
    "base",
    "",
    "Base weights of a LoRA checkpoint, as hf:DIR, meta:DIR or ckpt:DIR; empty: where they were "
    "in training.",
)
_MESH = flags.DEFINE_string(
    "mesh",
    "",
    "Devices along data, fsdp and tensor, such as fsdp=2,tensor=2; empty: as many along tensor as "
    "the model divides over.",
)
_JSON = flags.DEFINE_bool("json", False, "Print JSON instead of a table.")


def main() -> None:
    """Runs the command."""
    text, shards = _TEXT.value, _SHARDS.value
    if sum(bool(given) for given in (text, shards, _TASKS.value)) != 1:
        raise UserError("give one of --text=FILES, --shards=DIR and --tasks=NAMES")
    for flag in (_BATCH_SIZE, _LIMIT):
        if flag.value is not None and flag.value < 1:
            raise UserError(f"--{flag.name} must be at least 1, got {flag.value}")
        if flag.value is not None and flag.value >= 2**31:
            raise UserError(f"--{flag.name} must be less than 2**31, got {flag.value}")
    if _TASKS.value:
        _tasks(_TASKS.value)
        return
    model = open_model(_CHECKPOINT.value, _MESH.value, _BASE.value)
    if text:
        sources = read_texts(text, _TEXT_FIELD.value, model)
    else:
        assert shards is not None
        sources = read_shards(shards, _SPLIT.value, model)
    stride = _STRIDE.value or max(1, model.context // 2)
    results = evaluate(
        model, sources, stride=stride, batch_size=_BATCH_SIZE.value, limit=_LIMIT.value
    )
    print(to_json(model, stride, results) if _JSON.value else table(results))


def _tasks(names: list[str]) -> None:
    try:
        from llama_jax.inference import harness
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-evaluation-harness: pip install 'llama_jax[eval]' ({error})"
        ) from error
    harness.find_tasks(names)  # finds a misspelt name before loading the model
    results = harness.run_tasks(
        open_model(_CHECKPOINT.value, _MESH.value, _BASE.value),
        names,
        batch_size=_BATCH_SIZE.value,
        num_fewshot=_NUM_FEWSHOT.value,
        limit=_LIMIT.value,
        quiet=not sys.stderr.isatty(),
    )
    print(harness.to_json(results) if _JSON.value else harness.table(results))


if __name__ == "__main__":
    command.run(main, __doc__)
