"""Prepares token shards from raw text, once; training then only reads them.

The work is a list of parts (`documents.list_parts`). `write_part` turns each part into its own
shards, which depend on the arguments alone. So the bytes are the same whether this process, a pool
of processes or the workers of Apache Beam call it.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath

from llama_jax.config import Config, DataConfig
from llama_jax.data.mixture import parse_shares
from llama_jax.data.prepare import new_tokenizer, output_folder
from llama_jax.data.prepare.hold_out import hold_out_tail
from llama_jax.data.prepare.merge_reports import merge_reports
from llama_jax.data.prepare.report import Report, report_of
from llama_jax.data.prepare.workers import parts_done, write_parts
from llama_jax.data.shards import layout
from llama_jax.data.sources import text_files
from llama_jax.data.sources.documents import list_parts
from llama_jax.data.sources.listing import named_sources
from llama_jax.data.sources.part import Part, Tally
from llama_jax.data.vocabulary_size import trained_size
from llama_jax.errors import UserError
from llama_jax.files import read_json, write_atomically
from llama_jax.text import templates
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tokenizer_files import open_tokenizer

Log = Callable[[str], None]


def prepare(
    config: Config,
    output: epath.PathLike,
    *,
    beam_options: str | None = None,
    restart: bool = False,
    log: Log = print,
    own: Sequence[epath.PathLike] = (),
) -> list[Report]:
    """Writes the token shards of `config.data` to `output`, unless they exist already.

    Each named source gets its own folder, into which its shards are written directly. The manifest
    is written last and completes a folder. If a call is killed, the same call continues and keeps
    the finished parts.

    Args:
      config: `data` names what to read; `data.tokenizer_size`, or `model.vocab_size` if it is not
        set, is the number of ids of a new tokenizer.
      output: the folder of the shards: a new or empty one, or one with unfinished work.
      beam_options: run on Apache Beam with these pipeline options, such as
        `--runner=DataflowRunner --project=P`; None: run on this machine.
      restart: delete unfinished work in `output`, and begin again.
      log: receives lines for the user.
      own: further folders that this run writes; they are left out of the sources that contain them.

    Returns:
      A report for each source.

    Raises:
      UserError: there is no usable text; a source or the tokenizer cannot be read; `output` cannot
        be written, holds other files or work with other settings, or another process prepares
        there; or the disk is full. Files that were in `output` before are kept.
    """
    output = epath.Path(output)
    sources = named_sources(config.data.source)
    _check_mixture(config.data.mixture, sources)
    template = _template(config.data)
    settings = {name: _settings(config, source, template) for name, source in sources.items()}
    folders = {name: output / name for name in sources}
    with contextlib.ExitStack() as stack:
        # Complete folders are only read, which needs no lock.
        if not all(map(output_folder.is_tidy, folders.values())):
            stack.enter_context(output_folder.locked_folders(output, list(sources)))
        manifests = {
            name: _finished(folder, settings[name])
            for name, folder in folders.items()
            if output_folder.is_complete(folder)
        }
        # All sources are listed before one is read: a misspelt glob must not fail after days of
        # work.
        own = (*own, output)
        listings = {name: Tally() for name in sources}
        parts = {
            name: list_parts(source, config.data, own, listings[name], name)
            for name, source in sources.items()
            if name not in manifests
        }
        tokenizer = functools.cache(
            lambda: new_tokenizer.find_or_train(config, sources, output, log, own)
        )
        with output_folder.system_errors(output), _abandoned(folders, parts):
            for name, listed in parts.items():
                output_folder.begin(folders[name], settings[name], listed, config, restart, log)
            for name, folder in folders.items():
                if name:
                    log(f"source {name}: {sources[name]}")
                if name in manifests:
                    log(f"{folder} is prepared already")
                    continue
                manifests[name] = _write_source(
                    config,
                    settings[name],
                    parts[name],
                    listings[name],
                    folder,
                    tokenizer,
                    template,
                    beam_options,
                    log,
                )
                log(str(report_of(folder, manifests[name])))
    reports = [report_of(folder, manifests[name]) for name, folder in folders.items()]
    if len(reports) > 1:
        total = sum(report.splits["train"]["tokens"] for report in reports)
        for name, report in zip(sources, reports, strict=True):
            tokens = report.splits["train"]["tokens"]
            log(f"{name:<20}{tokens:>18,} tokens to train on{tokens / total:>9.2%} of all")
    return reports


@contextlib.contextmanager
def _abandoned(folders: dict[str, epath.Path], parts: dict[str, list[Part]]) -> Iterator[None]:
    """Removes failed work of sources, unless parts are done that the next attempt can use."""
    try:
        yield
    except UserError:
        for name, listed in parts.items():
            output_folder.abandon(folders[name], len(listed))
        raise


def _check_mixture(mixture: str, sources: dict[str, str]) -> None:
    """Checks that a mixture names only known sources; otherwise only training would notice.

    Raises:
      UserError: the mixture cannot be parsed, or names an unknown source.
    """
    unknown = set(parse_shares(mixture) if mixture else ()) - set(sources)
    if unknown and "" not in sources:
        raise UserError(
            f"data.mixture names {', '.join(sorted(unknown))}, but the sources are "
            f"{', '.join(sources)}"
        )


def _template(data: DataConfig) -> bytes:
    """Returns the chat template of instruction data, as stored with the shards; empty for text.

    Raises:
      UserError: the template does not exist, or `data.tokenizer` is not set.
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
    tokenizer = open_tokenizer(data.tokenizer)
    return templates.to_json(templates.open_choice(data.template, tokenizer, config))


def _settings(config: Config, source: str, template: bytes) -> dict[str, Any]:
    """Returns the settings that the shards depend on."""
    data = config.data
    instructions = {"template": hashlib.sha256(template).hexdigest()} if template else {}
    given = open_tokenizer(data.tokenizer) if data.tokenizer else None
    separator = {"separator": text_files.separator_of(data)} if data.separator else {}
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


def _finished(folder: epath.Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest of a complete folder.

    Raises:
      UserError: the manifest is damaged, or the shards were made with other settings.
    """
    manifest = layout.read_manifest(folder)
    if changed := output_folder.changes(manifest["settings"], settings):
        raise UserError(
            f"{folder} holds shards made with another {', '.join(changed)}; choose another "
            "folder, or delete this one if you don't need it"
        )
    with contextlib.suppress(OSError):  # the folder may be read-only
        output_folder.tidy(folder, manifest)
    return manifest


def _write_source(
    config: Config,
    settings: dict[str, Any],
    parts: list[Part],
    listing: Tally,
    folder: epath.Path,
    tokenizer: Callable[[], Tokenizer],
    template: bytes,
    beam_options: str | None,
    log: Log,
) -> dict[str, Any]:
    """Completes a folder of unfinished work; returns its manifest.

    Raises:
      UserError: there is no usable text, or a source or the tokenizer cannot be read.
      OSError: the disk is full, or not writable.
    """
    if not (folder / layout.TOKENIZER).exists():
        write_atomically(folder / layout.TOKENIZER, tokenizer().model_bytes)
    if template:
        write_atomically(folder / layout.TEMPLATE, template)
    try:
        write_parts(config.data, settings["pack_len"], parts, folder, beam_options)
        held_out = hold_out_tail(config.data, settings["pack_len"], parts, folder, log)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be closed
            done = sum(parts_done(folder, len(parts)))
            log(f"{done} of {len(parts)} parts are done in {folder}")
        raise
    manifest = merge_reports(settings, parts, folder, listing)
    if not manifest["splits"]["train"]["documents"]:
        output_folder.clear(folder)  # the same parts would only fail again
        what = "conversation" if template else "text"
        raise UserError(
            f"data.source={settings['source']} has no {what} to train on {_reasons(manifest)}"
        )
    if held_out:
        manifest["held_out"] = held_out
    output_folder.complete(folder, manifest)
    return manifest


def _reasons(manifest: dict[str, Any]) -> str:
    """Describes what was skipped and left out in a source that has nothing to train on."""
    noted = [
        (f"{count} {why}{' left out' if kind == 'left_out' else ''}", first)
        for kind in ("skipped", "left_out")
        for why, (count, first) in manifest[kind].items()
    ]
    if "template" in manifest["settings"]:
        return f"({', '.join(f'{what}; the first: {first}' for what, first in noted)})"
    counts = ", ".join(what for what, _ in noted)
    return f"({counts or 'no documents'})" + "".join(f"; the first: {first}" for _, first in noted)
