"""Summaries of prepared data: the mixture, rows as the model sees them, and document lengths.

Reads so little that 10,000 shards take no longer than 30: the rows to show, the rows whose tokens
are counted, and the lengths of documents in a few evenly spaced shards of each source.
"""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from llama_jax.config import MAX_STEPS, Config, DataConfig, ModelConfig, TrainConfig, from_json
from llama_jax.data.batches import Batches
from llama_jax.data.shards import layout
from llama_jax.data.shards.packing import INDEX_DTYPE
from llama_jax.data.show.rows import Screen, counts_of_inputs, legend, show_row
from llama_jax.data.training_data import open_data
from llama_jax.errors import UserError, as_user_error
from llama_jax.files import read_bytes
from llama_jax.text.answer_ends import count_in_splits, describe_unended
from llama_jax.text.tokenizer import Tokenizer

SEQ_LEN, BATCH = 256, 4  # used without a config
WINDOW = 1000  # sequences whose tokens are counted
CHUNK = 16  # sequences that a thread reads at a time
THREADS = 16
SAMPLED_SHARDS = 32  # shards of a source whose documents are measured


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Prepared data, opened as `train` opens it.

    Attributes:
      folder: the folder that the user named.
      config: the config of the run, or a default one for the shards.
      of_a_run: True if the config is that of a run, or was given by the user.
      batches: the batches as the model sees them.
      tokenizer: the tokenizer of the shards.
      fingerprint: identity of the tokens.
      folders: folder of shards of each source, by name.
      manifests: manifest of each source, by name.
    """

    folder: epath.Path
    config: Config
    of_a_run: bool
    batches: Batches
    tokenizer: Tokenizer
    fingerprint: str
    folders: dict[str, epath.Path]
    manifests: dict[str, dict[str, Any]]


def open_prepared(folder: epath.PathLike, config: Config | None = None) -> PreparedData:
    """Opens a folder of shards, of one or more sources, or a work directory of `train`.

    Args:
      folder: the folder.
      config: the config to read it with; default: the config of the work directory, or, for
        shards, one with batches of 4 x 256 tokens.

    Raises:
      UserError: there are no shards to show, or they are damaged or do not match the config.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name a folder of shards, or a work directory")
    where = folder
    path = folder / "config.json"
    if path.exists():
        try:
            saved = from_json(read_bytes(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        config = config or saved
        for field, does in (("streaming", "are streamed"), ("source", "are synthetic")):
            if getattr(saved.data, field) in (True, "synthetic"):
                raise UserError(f"the data of {folder} {does}: there are no token shards to show")
        where = epath.Path(saved.data.path or folder / "data")
    folders = layout.source_folders(where)
    manifests = {name: layout.read_manifest(path) for name, path in folders.items()}
    of_a_run = config is not None
    config = _reading(config or _made_up(folders, manifests), where, list(folders))
    data = open_data(config, where)
    assert isinstance(data.train, Batches) and data.tokenizer is not None
    names = data.train.names
    return PreparedData(
        folder=folder,
        config=config,
        of_a_run=of_a_run,
        batches=data.train,
        tokenizer=data.tokenizer,
        fingerprint=data.fingerprint,
        folders={name: folders[name] for name in names},
        manifests={name: manifests[name] for name in names},
    )


def _made_up(folders: dict[str, epath.Path], manifests: dict[str, dict[str, Any]]) -> Config:
    """Makes a default config for shards without a config."""
    name, manifest = next(iter(manifests.items()))
    pack_len = manifest["settings"].get("pack_len", 0)
    template = str(folders[name] / layout.TEMPLATE) if "template_sha256" in manifest else ""
    return Config(
        model=ModelConfig(vocab_size=manifest["vocab_size"]),
        data=DataConfig(packing="best_fit" if pack_len else "concat", template=template),
        train=TrainConfig(seq_len=pack_len or SEQ_LEN, global_batch=BATCH),
    )


def _reading(config: Config, where: epath.Path, names: list[str]) -> Config:
    """Returns the config, changed so that `open_data` reads these shards and prepares none."""
    data = dataclasses.replace(config.data, path=str(where), streaming=False)
    there = names != [""]
    if there:  # the names of the prepared sources replace those in the config
        mixed = all(stage.config.data.mixture for stage in config.stages)  # they name the sources
        source = "shards" if mixed else "; ".join(f"{name}=shards" for name in names)
        data = dataclasses.replace(data, source=source)
    elif data.source == "synthetic":
        data = dataclasses.replace(data, source="shards")
    return dataclasses.replace(config, data=data)


def summary(prepared: PreparedData, step: int, screen: Screen) -> str:
    """Returns a text on the data: identity, mixture as a table, and what was skipped.

    Args:
      prepared: the data.
      step: the first step whose sequences are counted.
      screen: properties of the terminal.
    """
    run, packed = prepared.config, prepared.config.data.packing == "best_fit"
    train = run.at(step).train
    how = "whole documents, packed" if packed else "documents cut every seq_len tokens"
    if prepared.config.data.template:
        how = "whole conversations, packed; the loss is that of the answers"
    head = (
        f"data    {prepared.folder}, fingerprint {prepared.fingerprint[:16]}",
        f"batch   {train.global_batch:,} sequences x {train.seq_len:,} tokens: {how}; "
        f"seed {train.seed}",
        *([f"stage   {_stage_of(run, step)}"] if run.train.stages else []),
        f"tokens  {prepared.tokenizer.vocab_size:,} ids",
    )
    # `_table` fails on a manifest with 0 tokens, or without a count of answers.
    with as_user_error(f"a manifest in {prepared.folder}"):
        lines = _table(prepared, step, packed)
    counted, window = "tokens", f"the {WINDOW:,} sequences from step {step:,} on"
    notes = []
    if prepared.config.data.template:
        counted = "tokens that count, those of answers,"
        notes.append(f"with prompts: of all tokens in {window}")
    notes.insert(0, f"requested, realised: of the {counted} in {window}")
    notes.append("available: of all tokens in the shards")
    if prepared.of_a_run:
        notes.append(f"epochs: in the {run.train.steps:,} steps of the run")
    return "\n".join(
        [
            *head,
            "",
            screen.paint(lines[0], "bold"),
            *lines[1:],
            screen.paint("; ".join(notes), "dim"),
            *(line for name in prepared.manifests for line in _remarks(prepared, name)),
        ]
    )


def _stage_of(config: Config, step: int) -> str:
    """Describes the stage of a run that a step belongs to."""
    stage = config.stage_at(step)
    number = config.stages.index(stage) + 1
    until = f"until step {stage.stop:,}" if stage.stop < MAX_STEPS else "to the end"
    values = " ".join(f"{name}={value}" for name, value in stage.values.items())
    return f"{number} of {len(config.stages)}, {until}: {values or 'the values of the config'}"


def _remarks(prepared: PreparedData, name: str) -> list[str]:
    """Returns the lines that `prepare` reported about one source."""
    manifest, where = prepared.manifests[name], name or "the source"
    files = sorted(manifest.get("files", {}).items())
    lines = [f"files in {where}: {count:,} {kind}" for kind, count in files]
    if held_out := manifest.get("held_out"):
        lines.append(f"held out of {where}: {held_out['tokens']:,} {held_out['why']}")
    for kind in ("left_out", "skipped", "changed"):
        for reason, (count, first) in sorted(manifest.get(kind, {}).items()):
            said = kind.replace("_", " ")
            lines.append(f"{said} in {where}: {count:,} {reason}; the first: {first}")
    answers, unended = count_in_splits(manifest["splits"])
    if answers:
        lines.append(f"{where}: {describe_unended(answers, unended)}")
    return lines


def _table(prepared: PreparedData, step: int, packed: bool) -> list[str]:
    requested = prepared.batches.schedule_at(step).shares
    counted, tokens = count_tokens(prepared, step)
    realised, of_all = _shares(counted), _shares(tokens)
    epochs = prepared.batches.epochs(prepared.config.train.steps)
    all_tokens = sum(m["splits"]["train"]["tokens"] for m in prepared.manifests.values())
    answers = bool(prepared.config.data.template)
    header = [
        "source",
        "requested",
        "realised",
        *(["with prompts"] if answers else []),
        "available",
    ]
    header += ["documents", "tokens", "bytes/token"]
    header += ["of answers"] if answers else []
    header += ["skipped", *(["padding"] if packed else [])]
    header += ["epochs"] if prepared.of_a_run else []
    rows = [header]
    for name, manifest in prepared.manifests.items():
        split = manifest["splits"]["train"]
        cells = [
            name or "(one)",
            *(f"{float(s):.2%}" for s in (requested.get(name, 0), realised[name])),
            *([f"{of_all[name]:.2%}"] if answers else []),
            f"{split['tokens'] / all_tokens:.2%}",
            f"{split['documents']:,}",
            f"{split['tokens']:,}",
            f"{split['text_bytes'] / split['tokens']:.2f}",
        ]
        if answers:
            cells.append(f"{split['answer_tokens'] / split['tokens']:.2%}")
        cells.append(f"{sum(count for count, _ in manifest.get('skipped', {}).values()):,}")
        if packed:
            slots = sum(shard["sequences"] for shard in split["shards"])
            slots *= prepared.config.at(step).train.seq_len
            cells.append(f"{1 - (split['tokens'] - split['documents']) / slots:.2%}")
        if prepared.of_a_run:
            cells.append(f"{epochs[name]:.2f}")
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def count_tokens(prepared: PreparedData, step: int) -> tuple[dict[str, int], dict[str, int]]:
    """Counts the tokens of each source in the `WINDOW` sequences from a step on.

    Returns:
      By source, the number of targets of weight 1, and the number of inputs that are tokens.

    Raises:
      UserError: a shard is damaged.
    """
    names = prepared.batches.names
    chunks, left = [], WINDOW
    while left:
        batch = prepared.config.at(step).train.global_batch
        chunks += [
            (step, range(first, min(first + CHUNK, batch, left)))
            for first in range(0, min(batch, left), CHUNK)
        ]
        step, left = step + 1, left - min(batch, left)

    # Each sequence may be in another shard, and an object store is slow but answers many requests
    # at once.
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        of_chunks = pool.map(lambda chunk: prepared.batches.count(*chunk), chunks)
        found = np.sum(list(of_chunks), axis=0)
    counted, tokens = (dict(zip(names, column.tolist(), strict=True)) for column in found.T)
    return counted, tokens


def realised_shares(prepared: PreparedData, step: int) -> dict[str, float]:
    """Returns the share of each source in the counted tokens of the `WINDOW` sequences from a step.

    Raises:
      UserError: a shard is damaged.
    """
    return _shares(count_tokens(prepared, step)[0])


def _shares(counts: dict[str, int]) -> dict[str, float]:
    return {name: count / sum(counts.values()) for name, count in counts.items()}


def show_rows(prepared: PreparedData, step: int, count: int, screen: Screen) -> Iterator[str]:
    """Yields lines that show rows of the batches, as the model sees them.

    Args:
      prepared: the data.
      step: the step of the first row.
      count: number of rows.
      screen: properties of the terminal.

    Raises:
      UserError: a shard is damaged.
    """
    answers = bool(prepared.config.data.template)
    yield legend(prepared.config.data.packing == "best_fit", screen, answers)
    at, index = step, -1
    for _ in range(count):
        index += 1
        if index == prepared.config.at(at).train.global_batch:
            at, index = at + 1, 0
        source, sequence = prepared.batches.draws(at, range(index, index + 1))[0]
        rows = prepared.batches.rows(at, range(index, index + 1))
        row = {name: value[0] for name, value in rows.items()}
        name = prepared.batches.names[source]
        used = int((row["weights"] > 0).sum())
        title = f"step {at:,}, row {index}" + (f", {name}" if name else "")
        yield ""
        there = prepared.batches.counts_at(at)[name]
        yield (
            f"{screen.paint(title, 'title')}   sequence {sequence:,} of {there:,}; "
            f"{used:,} of {len(row['weights']):,} tokens count"
        )
        if answers:
            row["counts"] = counts_of_inputs(row)
        yield from show_row(row, prepared.tokenizer, screen)


def document_lengths(folder: epath.Path, manifest: dict[str, Any]) -> np.ndarray:
    """Returns the tokens in each document (with BOS and EOS) of at most `SAMPLED_SHARDS` shards.

    Raises:
      UserError: an index is missing or damaged.
    """
    listed = manifest["splits"]["train"]["shards"]
    chosen = np.unique(np.linspace(0, len(listed) - 1, SAMPLED_SHARDS).round().astype(int))
    found = []
    for number in chosen.tolist():
        shard = listed[number]
        path = folder / f"{shard['name']}.idx"
        try:
            content = path.read_bytes()
            starts = np.frombuffer(content, INDEX_DTYPE)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        lengths = np.diff(starts, append=shard["tokens"])
        changed = hashlib.sha256(content).hexdigest() != shard["index_sha256"]
        if changed or len(starts) != shard["documents"] or (lengths < 2).any():
            raise UserError(f"{path} is damaged; check with llama_jax.prepare --verify")
        found.append(lengths)
    return np.concatenate(found)
