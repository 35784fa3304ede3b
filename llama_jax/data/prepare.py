"""Raw text to token shards, once; training then only reads.

The work is a list of parts (`sources.list_parts`), each turned into its own shards by `write_part`,
a function of its arguments alone. Who calls it does not matter: this process, a pool of processes,
or the workers of Apache Beam; the bytes are the same.
"""

import concurrent.futures
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from llama_jax.config import Config, DataConfig
from llama_jax.data import shards
from llama_jax.data.mixture import parse_shares
from llama_jax.data.sources import Part, Reading, documents, list_parts, named_sources, read
from llama_jax.data.tokenizer import SAMPLE_BYTES, Tokenizer, train_tokenizer
from llama_jax.errors import UserError

# Documents that are tokenised at once: enough to keep the library busy, few enough for the memory.
BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 8_000_000
PLAN = "plan.json"

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Report:
    """What preparing found in one source.

    Attributes:
      folder: where its shards are.
      splits: per split: documents, tokens, text_bytes, and sequences where documents are packed.
      skipped: documents that could not be used: reason -> (how many, where the first was).
      pack_len: sequence length that documents were packed for; 0 if they were not.
    """

    folder: epath.Path
    splits: dict[str, dict[str, int]]
    skipped: dict[str, list[Any]]
    pack_len: int

    def __str__(self) -> str:
        lines = [f"{'split':<12}{'documents':>12}{'tokens':>18}{'bytes/token':>13}"]
        if self.pack_len:
            lines[0] += f"{'sequences':>13}{'padding':>9}"
        for name, split in self.splits.items():
            ratio = split["text_bytes"] / split["tokens"] if split["tokens"] else 0.0
            line = f"{name:<12}{split['documents']:>12,}{split['tokens']:>18,}{ratio:>13.2f}"
            if self.pack_len:
                slots = split["sequences"] * self.pack_len
                # A document of n tokens has n - 1 inputs.
                used = split["tokens"] - split["documents"]
                share = 1 - used / slots if slots else 0.0
                line += f"{split['sequences']:>13,}{share:>9.2%}"
            lines.append(line)
        for reason, (count, first) in sorted(self.skipped.items()):
            lines.append(f"skipped     {count:>12,}  {reason}; the first: {first}")
        return "\n".join([*lines, f"token shards in {self.folder}"])


def prepare(
    config: Config, output: epath.PathLike, *, beam_options: str | None = None, log: Log = print
) -> list[Report]:
    """Writes the token shards of `config.data` to `output`, or finds that they are there.

    Named sources get a folder each. A folder appears under its name only when it is complete; what
    is finished of a run that was killed is kept in `NAME.partial`, and the same call goes on there.

    Args:
      config: `data` says what to read; `model.vocab_size` sizes a new tokenizer.
      output: the folder to make.
      beam_options: run on Apache Beam with these pipeline options, such as
        `--runner=DataflowRunner --project=P`; None: on this machine.
      log: takes lines for the user.

    Returns:
      A report for each source.

    Raises:
      UserError: no usable text, an unreadable source or tokenizer, an `output` that holds something
        else, or a full disk. What was in `output` before is still there.
    """
    output = epath.Path(output)
    sources = named_sources(config.data.source)
    tokenizer = functools.cache(lambda: _tokenizer(config, sources, output, log))
    reports = []
    for name, source in sources.items():
        if name:
            log(f"source {name}: {source}")
        folder = output / name if name else output
        try:
            reports.append(_prepare_source(config, source, folder, tokenizer, beam_options, log))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(
                    f"the disk is full: cannot write {folder}; free some space, and the same "
                    "command goes on where it was"
                ) from error
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    if len(reports) > 1:
        total = sum(report.splits["train"]["tokens"] for report in reports)
        for name, report in zip(sources, reports, strict=True):
            tokens = report.splits["train"]["tokens"]
            log(f"{name:<20}{tokens:>18,} tokens to train on{tokens / total:>9.2%} of all")
    return reports


def _settings(config: Config, source: str) -> dict[str, Any]:
    """What the shards depend on; another value would give other shards."""
    data = config.data
    return {
        "source": source,
        "text_field": data.text_field,
        "tfds_split": data.tfds_split,
        "validation_fraction": data.validation_fraction,
        "max_document_bytes": data.max_document_bytes,
        "vocab_size": config.model.vocab_size,
        "pack_len": config.train.seq_len if data.packing == "best_fit" else 0,
        "tokenizer": Tokenizer.load(data.tokenizer).fingerprint if data.tokenizer else "trained",
    }


def _prepare_source(
    config: Config,
    source: str,
    output: epath.Path,
    tokenizer: Callable[[], Tokenizer],
    beam_options: str | None,
    log: Log,
) -> Report:
    settings = _settings(config, source)
    if (output / shards.MANIFEST).exists():
        manifest = shards.read_manifest(output)
        old = manifest["settings"]
        changed = [name for name in settings if old.get(name) != settings[name]]
        if changed:
            raise UserError(
                f"{output} holds shards made with another {', '.join(changed)}; choose another "
                "folder, or delete this one if you don't need it"
            )
        log(f"{output} is prepared already")
        return _report(output, manifest)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty and holds no token shards; choose another folder")
    parts = list_parts(source, config.data)
    made_here = not output.parent.exists()
    partial = output.parent / f"{output.name}.partial"
    _open_partial(partial, settings, parts, config, log)
    try:
        if not (partial / shards.TOKENIZER).exists():
            model = tokenizer().model_bytes
            _write_atomically(partial / shards.TOKENIZER, model)
        _write_parts(config.data, settings["pack_len"], parts, partial, beam_options)
        manifest = _merge(settings, parts, partial)
        if not manifest["splits"]["train"]["documents"]:
            reasons = (f"{count} {why}" for why, (count, _) in manifest["skipped"].items())
            raise UserError(
                f"data.source={source} has no text to train on "
                f"({', '.join(reasons) or 'no documents'})"
            )
    except UserError:
        if any(_done(partial, parts)):
            raise  # what is finished is kept for another try
        partial.rmtree()
        if made_here and not any(output.parent.iterdir()):
            output.parent.rmdir()
        raise
    _write_atomically(partial / shards.MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    for path in [partial / PLAN, *(partial / _report_name(i) for i in range(len(parts)))]:
        path.unlink()
    if output.exists():
        output.rmdir()
    partial.rename(output)
    report = _report(output, manifest)
    log(str(report))
    return report


def _open_partial(
    partial: epath.Path, settings: dict[str, Any], parts: list[Part], config: Config, log: Log
) -> None:
    """Makes the folder of unfinished work, or finds one of the very same work."""
    plan = json.dumps(
        [settings, [dataclasses.asdict(part) for part in parts], config.data.shard_tokens]
    )
    if partial.exists():
        if (partial / PLAN).exists() and (partial / PLAN).read_text() == plan:
            done = sum(_done(partial, parts))
            log(f"going on in {partial}: {done} of {len(parts)} parts are done")
            return
        partial.rmtree()
    partial.mkdir(parents=True)
    _write_atomically(partial / PLAN, plan.encode())


def _done(partial: epath.Path, parts: list[Part]) -> list[bool]:
    """Of each part, whether its shards are complete."""
    return [(partial / _report_name(index)).exists() for index in range(len(parts))]


def _write_atomically(path: epath.Path, data: bytes) -> None:
    temporary = path.parent / f"{path.name}.tmp-{os.getpid()}"
    temporary.write_bytes(data)
    temporary.rename(path)


def _report_name(index: int) -> str:
    return f"part-{index:05d}.json"


def _tokenizer(config: Config, sources: dict[str, str], output: epath.Path, log: Log) -> Tokenizer:
    """The given tokenizer, that of a source prepared before, or a new one from all sources."""
    size = config.model.vocab_size
    if config.data.tokenizer:
        tokenizer = Tokenizer.load(config.data.tokenizer)
        if tokenizer.vocab_size != size:
            raise UserError(
                f"tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} ids, "
                f"but model.vocab_size is {size}"
            )
        return tokenizer
    for name in filter(None, sources):
        for folder in (output / name, output / f"{name}.partial"):
            if (folder / shards.TOKENIZER).exists():
                return Tokenizer.load(folder / shards.TOKENIZER)
    log(f"training a tokenizer of {size:,} ids on {config.data.source}")
    shares = dict.fromkeys(sources, 1 / len(sources))
    if config.data.mixture:
        given = parse_shares(config.data.mixture)
        shares = {name: float(given.get(name, 0)) for name in sources}

    def sample() -> Iterator[str]:
        for name, source in sources.items():
            taken = 0
            for text in documents(source, config.data, Reading()):
                if taken >= shares[name] * SAMPLE_BYTES:
                    break
                taken += len(text.encode())
                yield text

    return train_tokenizer(sample(), size)


def write_part(
    data: DataConfig,
    pack_len: int,
    folder: str,
    index: int,
    part: Part,
    progress: Callable[[int, int], None] = lambda position, tokens: None,
    threads: int = 1,
) -> int:
    """Writes the shards of one part and then its report, which makes it count; returns the index.

    Args:
      data: how to read, and how large shards are.
      pack_len: sequence length to pack documents for; 0: do not.
      folder: where to; holds the tokenizer.
      index: number of the part.
      part: what to read.
      progress: takes bytes of the source and tokens as they are done.
      threads: that tokenise.

    Raises:
      UserError: a file cannot be opened.
      OSError: the disk is full, or not writable.
    """
    path = epath.Path(folder)
    tokenizer = Tokenizer.load(path / shards.TOKENIZER)
    writers = {
        split: shards.ShardWriter(
            path, f"{split}-{index:05d}", tokenizer.vocab_size, data.shard_tokens, pack_len
        )
        for split in shards.SPLITS
    }
    reading = Reading()
    position = 0
    for batch in _batches(read(part, data, reading)):
        n_tokens = 0
        encoded = tokenizer.encode_documents(batch, threads)
        for text, ids in zip(batch, encoded, strict=True):
            raw = text.encode()
            split = "validation" if _held_out(raw, data.validation_fraction) else "train"
            writers[split].add(ids, len(raw))
            n_tokens += len(ids)
        progress(reading.position - position, n_tokens)
        position = reading.position
    progress(part.size - position, 0)
    report = {
        "splits": {split: writer.finish() for split, writer in writers.items()},
        "skipped": {why: [count, reading.first[why]] for why, count in reading.skipped.items()},
    }
    _write_atomically(path / _report_name(index), json.dumps(report).encode())
    return index


def _batches(stream: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in stream:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _held_out(data: bytes, fraction: float) -> bool:
    """Whether a document is held out: by its contents, so that copies go the same way."""
    digest = hashlib.sha256(data).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


_counters: Any = None  # of a worker process: bytes and tokens done, shared with the parent


def _start_worker(counters: Any) -> None:
    global _counters
    _counters = counters


def _count(position: int, tokens: int) -> None:
    with _counters.get_lock():
        _counters[0] += position
        _counters[1] += tokens


def _write_parts(
    data: DataConfig, pack_len: int, parts: list[Part], folder: epath.Path, beam_options: str | None
) -> None:
    """Writes all parts that are not done yet."""
    finished = _done(folder, parts)
    todo = [(index, part) for index, part in enumerate(parts) if not finished[index]]
    if beam_options is not None:
        _write_on_beam(data, pack_len, todo, folder, beam_options)
        return
    bar = _Progress(sum(part.size for _, part in todo))
    workers = min(data.workers or os.cpu_count() or 1, len(todo))
    if workers <= 1:
        threads = data.workers or os.cpu_count() or 1
        for index, part in todo:
            write_part(data, pack_len, str(folder), index, part, bar.add, threads)
        bar.close()
        return
    # Not a fork: JAX, TensorFlow and SentencePiece have threads, which do not survive one.
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 2)
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, _start_worker, (counters,)
    ) as pool:
        futures = {
            pool.submit(write_part, data, pack_len, str(folder), index, part, _count)
            for index, part in todo
        }
        try:
            while futures:
                done, futures = concurrent.futures.wait(
                    futures, 0.5, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()
                bar.set(counters[0], counters[1])
        except concurrent.futures.process.BrokenProcessPool as error:
            raise OSError(errno.ECHILD, "a worker process was killed (out of memory?)") from error
        finally:
            for future in futures:
                future.cancel()
    bar.close()


def _write_on_beam(
    data: DataConfig,
    pack_len: int,
    todo: list[tuple[int, Part]],
    folder: epath.Path,
    options: str,
) -> None:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("Apache Beam is not installed; pip install 'llama_jax[beam]'") from error
    with beam.Pipeline(options=PipelineOptions(options.split())) as pipeline:
        _ = (
            pipeline
            | beam.Create(todo)
            | beam.Reshuffle()  # so that parts spread over workers
            | beam.MapTuple(functools.partial(write_part, data, pack_len, str(folder)))
        )


def _merge(settings: dict[str, Any], parts: list[Part], folder: epath.Path) -> dict[str, Any]:
    """The manifest of all parts."""
    reports = [json.loads((folder / _report_name(i)).read_text()) for i in range(len(parts))]
    skipped: dict[str, list[Any]] = {}
    for reason, (count, first) in itertools.chain.from_iterable(
        report["skipped"].items() for report in reports
    ):
        skipped.setdefault(reason, [0, first])[0] += count
    splits: dict[str, dict[str, Any]] = {}
    for split in shards.SPLITS:
        found = [report["splits"][split] for report in reports]
        splits[split] = {
            name: sum(one[name] for one in found) for name in ("documents", "tokens", "text_bytes")
        }
        splits[split]["shards"] = [shard for one in found for shard in one["shards"]]
    tokenizer = Tokenizer.load(folder / shards.TOKENIZER)
    return {
        "format_version": shards.FORMAT_VERSION,
        "settings": settings,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.fingerprint,
        "skipped": skipped,
        "splits": splits,
    }


def _report(folder: epath.Path, manifest: dict[str, Any]) -> Report:
    splits = {}
    for name in shards.SPLITS:
        split = manifest["splits"][name]
        splits[name] = {key: split[key] for key in ("documents", "tokens", "text_bytes")}
        splits[name]["sequences"] = sum(shard.get("sequences", 0) for shard in split["shards"])
    return Report(folder, splits, manifest["skipped"], manifest["settings"].get("pack_len", 0))


class _Progress:
    """One line on a terminal, rewritten twice a second; in a log file, a line a minute."""

    def __init__(self, total: int) -> None:
        self._began = self._shown = time.monotonic()
        self._total, self._bytes, self._tokens = total, 0, 0
        self._terminal = sys.stderr.isatty()

    def add(self, n_bytes: int, n_tokens: int) -> None:
        """Counts what is done."""
        self.set(self._bytes + n_bytes, self._tokens + n_tokens)

    def set(self, n_bytes: int, n_tokens: int) -> None:
        """Shows how much is done."""
        self._bytes, self._tokens = n_bytes, n_tokens
        now = time.monotonic()
        if now - self._shown < (0.5 if self._terminal else 60):
            return
        self._shown = now
        seconds = now - self._began
        left = (self._total - n_bytes) * seconds / max(n_bytes, 1)
        text = (
            f"{n_bytes / max(self._total, 1):6.1%}  {n_bytes / 1e6:,.0f} of "
            f"{self._total / 1e6:,.0f} MB  {n_bytes / 1e6 / seconds:.1f} MB/s  "
            f"{n_tokens / seconds:,.0f} tokens/s  ETA {left / 60:,.0f}m{left % 60:02.0f}s"
        )
        end = "" if self._terminal else "\n"
        start = "\r" if self._terminal else ""
        print(f"{start}{text:<90}", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clears the line."""
        if self._terminal:
            print("\r" + " " * 90 + "\r", end="", file=sys.stderr, flush=True)
