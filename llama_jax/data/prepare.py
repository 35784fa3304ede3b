"""Raw text to token shards, once; training then only reads.

The work is a list of parts (`sources.list_parts`), each turned into its own shards by `write_part`,
a function of its arguments alone. Who calls it does not matter: this process, a pool of processes,
or the workers of Apache Beam; the bytes are the same.
"""

import dataclasses
import errno
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from llama_jax.config import Config, DataConfig
from llama_jax.data import cutting, new_tokenizer, shard_folder, templates
from llama_jax.data.merge import merge_reports
from llama_jax.data.mixture import parse_shares
from llama_jax.data.part import report_name
from llama_jax.data.reading import Part, Reading
from llama_jax.data.report import Report, report_of
from llama_jax.data.rows import trained_size
from llama_jax.data.sources import list_parts, named_sources
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.data.workers import parts_done, write_parts
from llama_jax.errors import UserError
from llama_jax.files import read_json, write_atomically

PLAN = "plan.json"

Log = Callable[[str], None]


def prepare(
    config: Config,
    output: epath.PathLike,
    *,
    beam_options: str | None = None,
    log: Log = print,
    own: Sequence[epath.PathLike] = (),
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
      own: further folders that this run writes, which are no part of a source that they lie in.

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
    own = (*own, output)
    listings = {name: Reading() for name in sources}
    parts = {
        name: list_parts(source, config.data, own, listings[name], name)
        for name, source in sources.items()
        if not (output / name / shard_folder.MANIFEST).exists()
    }
    tokenizer = functools.cache(
        lambda: new_tokenizer.find_or_train(config, sources, output, log, own)
    )
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
                    listings[name],
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
    separator = {"separator": cutting.separator_of(data)} if data.separator else {}
    return {
        **instructions,
        **separator,
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
    listing: Reading,
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
        write_parts(config.data, settings["pack_len"], parts, partial, beam_options)
        manifest = merge_reports(settings, parts, partial, listing)
        if not manifest["splits"]["train"]["documents"]:
            what = "conversation" if template else "text"
            raise UserError(
                f"data.source={settings['source']} has no {what} to train on {_reasons(manifest)}"
            )
    except UserError:
        if any(parts_done(partial, parts)):
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


def _reasons(manifest: dict[str, Any]) -> str:
    """Why a source has nothing to train on: what was met instead, and where the first of each."""
    noted = [
        (f"{count} {why}{' left out' if kind == 'left_out' else ''}", first)
        for kind in ("skipped", "left_out")
        for why, (count, first) in manifest[kind].items()
    ]
    if "template" in manifest["settings"]:
        return f"({', '.join(f'{what}; the first: {first}' for what, first in noted)})"
    counts = ", ".join(what for what, _ in noted)
    return f"({counts or 'no documents'})" + "".join(f"; the first: {first}" for _, first in noted)


def _open_partial(
    partial: epath.Path, settings: dict[str, Any], parts: list[Part], config: Config, log: Log
) -> None:
    """Makes the folder of unfinished work, or finds one of the very same work."""
    plan = json.dumps(
        [settings, [dataclasses.asdict(part) for part in parts], config.data.shard_tokens]
    )
    if partial.exists():
        if (partial / PLAN).exists() and (partial / PLAN).read_text() == plan:
            done = sum(parts_done(partial, parts))
            log(f"going on in {partial}: {done} of {len(parts)} parts are done")
            return
        partial.rmtree()
    partial.mkdir(parents=True)
    write_atomically(partial / PLAN, plan.encode())
