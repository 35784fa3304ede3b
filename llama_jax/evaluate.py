"""How good a model is: `python -m llama_jax.evaluate --checkpoint=DIR`, and what on.

Perplexity of text files (as data.source, see llama_jax/config.py) or of token shards; and tasks of
lm-evaluation-harness, its own by name or yours by file (`pip install 'llama_jax[eval]'`).

Example:
  python -m llama_jax.evaluate --checkpoint=runs/tiny --text='books/*.txt' --stride=128
  python -m llama_jax.evaluate --checkpoint=runs/tiny --shards=runs/tiny/data --json
  python -m llama_jax.evaluate --checkpoint=runs/7b --tasks=hellaswag,my_tasks/quiz.yaml \\
      --mesh=fsdp=2,tensor=4 --num_fewshot=0
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator

import jax
from absl import flags

from llama_jax import cli
from llama_jax.config import DataConfig
from llama_jax.data.documents import documents
from llama_jax.data.listing import named_sources
from llama_jax.data.reading import Tally
from llama_jax.data.shard_folder import SPLITS, source_folders, unchecked_remark
from llama_jax.data.shards import TokenDataset
from llama_jax.errors import UserError
from llama_jax.inference import InferenceModel, open_model
from llama_jax.perplexity import Document, Totals, perplexity, shard_document, text_document
from llama_jax.scoring import Scorer

COLUMNS = {
    "documents": ",",
    "tokens": ",",
    "words": ",",
    "bytes": ",",
    "loss": ".4f",
    "token_perplexity": ",.3f",
    "word_perplexity": ",.3f",
    "byte_perplexity": ",.4f",
    "bits_per_byte": ".4f",
}
REPORT_SECONDS = 5.0


class Progress:
    """Says on stderr, now and then and at the end, how many tokens are scored."""

    def __init__(self) -> None:
        self._start = self._said = time.perf_counter()
        self._tokens = 0

    def __call__(self, tokens: int) -> None:
        """Counts more tokens."""
        self._tokens += tokens
        now = time.perf_counter()
        if now - self._said >= REPORT_SECONDS:
            self._said = now
            self.say()

    def say(self) -> None:
        """Says it now."""
        speed = self._tokens / (time.perf_counter() - self._start)
        print(f"{self._tokens:,} tokens, {speed:,.0f} tokens/s", file=sys.stderr, flush=True)


def read_texts(source: str, field: str, model: InferenceModel) -> dict[str, Iterator[Document]]:
    """Documents of each named source of `--text`.

    Raises:
      UserError: a source is misspelt; when read: a file is missing.
    """
    data = DataConfig(source=source, text_field=field)
    return {
        name: (text_document(text, model.tokenizer) for text in _texts(spec, data))
        for name, spec in named_sources(source).items()
    }


def _texts(source: str, data: DataConfig) -> Iterator[str]:
    """Texts of a source; at the end it says what was skipped of it."""
    tally, some = Tally(), False
    try:
        for text in documents(source, data, tally):
            some = True
            yield text
    finally:  # also where no more of them are asked for; without any, an error says so
        if some and str(tally):
            print(tally, file=sys.stderr, flush=True)


def read_shards(folder: str, split: str, model: InferenceModel) -> dict[str, Iterator[Document]]:
    """Documents of each source of prepared shards.

    Raises:
      UserError: there are no shards, they are damaged, or of another tokenizer.
    """
    found: dict[str, Iterator[Document]] = {}
    for name, path in source_folders(folder).items():
        data = TokenDataset.open(path, split)
        if data.tokenizer_sha256 != model.tokenizer.fingerprint:
            raise UserError(
                f"the shards in {path} are of another tokenizer than the checkpoint {model.folder}"
            )
        if data.unchecked:
            remark = unchecked_remark([str(path)])
            print(f"warning: {remark}", file=sys.stderr, flush=True)
        found[name] = (shard_document(tokens, model.tokenizer) for tokens in data.documents())
    return found


def evaluate(
    model: InferenceModel,
    sources: dict[str, Iterator[Document]],
    *,
    stride: int,
    batch_size: int,
    limit: int | None,
) -> dict[str, dict[str, float]]:
    """Results of each source, and of all together where there are several.

    Raises:
      UserError: as `perplexity`.
    """
    scorer = Scorer(model.config.model, model.params, model.context, batch_size)
    progress, totals = Progress(), {}
    with jax.set_mesh(model.mesh):
        for name, found in sources.items():
            some = itertools.islice(found, limit)
            totals[name or "text"] = perplexity(scorer, some, stride, progress)
    progress.say()
    if len(totals) > 1:
        totals["all"] = sum(totals.values(), Totals())
    return {name: total.results() for name, total in totals.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """The results in columns."""
    rows = [["", *(name.replace("_", " ") for name in COLUMNS)]]
    rows += [
        [name, *(format(row[column], how) for column, how in COLUMNS.items())]
        for name, row in results.items()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def to_json(model: InferenceModel, stride: int, results: dict[str, dict[str, float]]) -> str:
    """The results and what they are of; null for what is infinite or undefined."""
    finite = {
        name: {key: value if math.isfinite(value) else None for key, value in row.items()}
        for name, row in results.items()
    }
    described = {
        "checkpoint": str(model.folder),
        "context": model.context,
        "stride": stride,
        "results": finite,
    }
    return json.dumps(described, indent=2, ensure_ascii=False)


def main() -> None:
    """The command; flags are defined below."""
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
        from llama_jax import harness
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-evaluation-harness: pip install 'llama_jax[eval]' ({error})"
        ) from error
    harness.find_tasks(names)  # a misspelt name costs no loading
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
    _CHECKPOINT = cli.path_flag(
        "checkpoint", None, "Work directory (its newest step), or the folder of one step."
    )
    _TEXT = flags.DEFINE_string(
        "text", None, "Text to score: files, folders, globs; NAME=FILES; NAME=FILES for several."
    )
    _TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Of a JSON line or a Parquet table.")
    _SHARDS = cli.path_flag("shards", None, "Folder of token shards to score.")
    _SPLIT = flags.DEFINE_enum("split", "validation", SPLITS, "Of the shards.")
    _TASKS = cli.path_list_flag("tasks", None, "Tasks of the harness, or paths of task files.")
    _NUM_FEWSHOT = flags.DEFINE_integer(
        "num_fewshot", None, "Examples before each question; default: the task's own number."
    )
    _STRIDE = flags.DEFINE_integer(
        "stride", None, "Tokens that the window moves on; default: half of the context."
    )
    _BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Windows or requests at a time.")
    _LIMIT = flags.DEFINE_integer("limit", None, "Documents of each source or task at most.")
    _BASE = cli.path_flag(
        "base",
        "",
        "Weights below the adapters of a LoRA checkpoint, as hf:DIR, meta:DIR or ckpt:DIR; empty: "
        "where they were in training.",
    )
    _MESH = flags.DEFINE_string(
        "mesh",
        "",
        "Devices along data, fsdp, tensor: fsdp=2,tensor=2; empty: by the model.",
    )
    _JSON = flags.DEFINE_bool("json", False, "Print JSON, not a table.")
    cli.run(main, __doc__)
