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
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from llama_jax.config import Config, DataConfig
from llama_jax.data import beam, shards
from llama_jax.data.mixture import parse_shares
from llama_jax.data.report import Progress, Report, report_of
from llama_jax.data.sources import Part, Reading, documents, list_parts, named_sources, read
from llama_jax.data.tokenizer import SAMPLE_BYTES, Tokenizer, train_tokenizer
from llama_jax.errors import UserError

# Documents that are tokenised at once: enough to keep the library busy, few enough for the memory.
BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 8_000_000
PLAN = "plan.json"

Log = Callable[[str], None]


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
    _check_mixture(config.data.mixture, sources)
    # All are listed before any is read: a misspelt glob must not wait behind days of work.
    parts = {
        name: list_parts(source, config.data)
        for name, source in sources.items()
        if not (output / name / shards.MANIFEST).exists()
    }
    tokenizer = functools.cache(lambda: _tokenizer(config, sources, output, log))
    reports = []
    for name, source in sources.items():
        if name:
            log(f"source {name}: {source}")
        folder = output / name
        settings = _settings(config, source)
        try:
            reports.append(
                _prepare_source(
                    config, settings, parts.get(name, []), folder, tokenizer, beam_options, log
                )
            )
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


def _check_mixture(mixture: str, sources: dict[str, str]) -> None:
    """Shares of sources that are not there would be noticed when training starts, and not before.

    Raises:
      UserError: bad shares, or one of an unknown source.
    """
    unknown = set(parse_shares(mixture) if mixture else ()) - set(sources)
    if unknown and "" not in sources:
        raise UserError(
            f"data.mixture names {', '.join(sorted(unknown))}, but the sources are "
            f"{', '.join(sources)}"
        )


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
    settings: dict[str, Any],
    parts: list[Part],
    output: epath.Path,
    tokenizer: Callable[[], Tokenizer],
    beam_options: str | None,
    log: Log,
) -> Report:
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
        return report_of(output, manifest)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty and holds no token shards; choose another folder")
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
                f"data.source={settings['source']} has no text to train on "
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
    report = report_of(output, manifest)
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
        beam.run(functools.partial(write_part, data, pack_len, str(folder)), todo, beam_options)
        return
    bar = Progress(sum(part.size for _, part in todo))
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
