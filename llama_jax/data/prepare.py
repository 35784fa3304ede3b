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
from llama_jax.data import beam, shard_folder, templates
from llama_jax.data.mixture import parse_shares
from llama_jax.data.part import report_name, write_part
from llama_jax.data.reading import Part, Reading
from llama_jax.data.report import Progress, Report, report_of
from llama_jax.data.rows import check_ids, trained_size
from llama_jax.data.sources import documents, list_parts, named_sources
from llama_jax.data.tokenizer import SAMPLE_BYTES, Tokenizer, train_tokenizer
from llama_jax.errors import UserError
from llama_jax.files import read_json, write_atomically

PLAN = "plan.json"

Log = Callable[[str], None]


def prepare(
    config: Config, output: epath.PathLike, *, beam_options: str | None = None, log: Log = print
) -> list[Report]:
    """Writes the token shards of `config.data` to `output`, or finds that they are there.

    Named sources get a folder each. A folder appears under its name only when it is complete; what
    is finished of a run that was killed is kept in `NAME.partial`, and the same call goes on there.

    Args:
      config: `data` says what to read, `data.tokenizer_size` or else `model.vocab_size` how many
        ids a new tokenizer gets.
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
    template = _template(config.data)
    # All are listed before any is read: a misspelt glob must not wait behind days of work.
    parts = {
        name: list_parts(source, config.data)
        for name, source in sources.items()
        if not (output / name / shard_folder.MANIFEST).exists()
    }
    tokenizer = functools.cache(lambda: _tokenizer(config, sources, output, log))
    reports = []
    for name, source in sources.items():
        if name:
            log(f"source {name}: {source}")
        folder = output / name
        settings = _settings(config, source, template)
        try:
            reports.append(
                _prepare_source(
                    config,
                    settings,
                    parts.get(name, []),
                    folder,
                    tokenizer,
                    template,
                    beam_options,
                    log,
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


def _template(data: DataConfig) -> bytes:
    """The chat template of instruction data as the shards keep it; nothing for plain text.

    Raises:
      UserError: there is no such template, or no tokenizer for it.
    """
    if not data.template:
        return b""
    if not data.tokenizer:
        raise UserError(
            "data.template needs the tokenizer of the model in data.tokenizer: its tokenizer.model "
            "or tokenizer.json"
        )
    place = epath.Path(data.tokenizer)
    beside = (place if place.is_dir() else place.parent) / "tokenizer_config.json"
    config = read_json(beside) if beside.exists() else {}
    tokenizer = Tokenizer.load(data.tokenizer)
    return templates.to_json(templates.open_choice(data.template, tokenizer, config))


def _settings(config: Config, source: str, template: bytes) -> dict[str, Any]:
    """What the shards depend on; another value would give other shards."""
    data = config.data
    instructions = {"template": hashlib.sha256(template).hexdigest()} if template else {}
    given = Tokenizer.load(data.tokenizer) if data.tokenizer else None
    return {
        **instructions,
        "source": source,
        "text_field": data.text_field,
        "tfds_split": data.tfds_split,
        "validation_fraction": data.validation_fraction,
        "max_document_bytes": data.max_document_bytes,
        "vocab_size": given.vocab_size if given else trained_size(config),
        "pack_len": config.train.seq_len if data.packing == "best_fit" else 0,
        "tokenizer": given.fingerprint if given else "trained",
    }


def _prepare_source(
    config: Config,
    settings: dict[str, Any],
    parts: list[Part],
    output: epath.Path,
    tokenizer: Callable[[], Tokenizer],
    template: bytes,
    beam_options: str | None,
    log: Log,
) -> Report:
    if (output / shard_folder.MANIFEST).exists():
        manifest = shard_folder.read_manifest(output)
        old = manifest["settings"]
        changed = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
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
        if not (partial / shard_folder.TOKENIZER).exists():
            model = tokenizer().model_bytes
            write_atomically(partial / shard_folder.TOKENIZER, model)
        if template:
            write_atomically(partial / shard_folder.TEMPLATE, template)
        _write_parts(config.data, settings["pack_len"], parts, partial, beam_options)
        manifest = _merge(settings, parts, partial)
        if not manifest["splits"]["train"]["documents"]:
            skipped = manifest["skipped"].items()
            reasons = [f"{count} {why}" for why, (count, _) in skipped]
            if template:
                reasons = [f"{count} {why}; the first: {where}" for why, (count, where) in skipped]
            what = "conversation" if template else "text"
            raise UserError(
                f"data.source={settings['source']} has no {what} to train on "
                f"({', '.join(reasons) or 'no documents'})"
            )
    except UserError:
        if any(_done(partial, parts)):
            raise  # what is finished is kept for another try
        partial.rmtree()
        if made_here and not any(output.parent.iterdir()):
            output.parent.rmdir()
        raise
    write_atomically(partial / shard_folder.MANIFEST, shard_folder.encode_manifest(manifest))
    for path in [partial / PLAN, *(partial / report_name(i) for i in range(len(parts)))]:
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
    write_atomically(partial / PLAN, plan.encode())


def _done(partial: epath.Path, parts: list[Part]) -> list[bool]:
    """Of each part, whether its shards are complete."""
    return [(partial / report_name(index)).exists() for index in range(len(parts))]


def _tokenizer(config: Config, sources: dict[str, str], output: epath.Path, log: Log) -> Tokenizer:
    """The given tokenizer, that of a source prepared before, or a new one from all sources."""
    size = trained_size(config)
    if config.data.tokenizer:
        tokenizer = Tokenizer.load(config.data.tokenizer)
        ids = tokenizer.vocab_size
        check_ids(ids, config, f"tokenizer {config.data.tokenizer} has {ids} ids")
        return tokenizer
    for name in filter(None, sources):
        for folder in (output / name, output / f"{name}.partial"):
            if (folder / shard_folder.TOKENIZER).exists():
                return Tokenizer.load(folder / shard_folder.TOKENIZER)
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
    reports = [json.loads((folder / report_name(i)).read_text()) for i in range(len(parts))]
    noted: dict[str, dict[str, list[Any]]] = {"skipped": {}, "changed": {}}
    for report, (kind, counts) in itertools.product(reports, noted.items()):
        for reason, (count, first) in report.get(kind, {}).items():
            counts.setdefault(reason, [0, first])[0] += count
    splits: dict[str, dict[str, Any]] = {}
    for split in shard_folder.SPLITS:
        found = [report["splits"][split] for report in reports]
        names = ["documents", "tokens", "answer_tokens", "text_bytes"]
        if "template" in settings:
            names += ["answers", "unended_answers"]
        splits[split] = {name: sum(one.get(name, 0) for one in found) for name in names}
        splits[split]["shards"] = [shard for one in found for shard in one["shards"]]
    tokenizer = Tokenizer.load(folder / shard_folder.TOKENIZER)
    return {
        "format_version": shard_folder.FORMAT_VERSION,
        "settings": settings,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.fingerprint,
        **({"template_sha256": settings["template"]} if "template" in settings else {}),
        **noted,
        "splits": splits,
    }
