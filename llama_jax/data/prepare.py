"""Raw text to token shards, once; training then only reads."""

import collections
import dataclasses
import errno
import hashlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from llama_jax.config import Config
from llama_jax.data import shards
from llama_jax.data.sources import Document, Skipped, documents
from llama_jax.data.tokenizer import Tokenizer, train_tokenizer
from llama_jax.errors import UserError

BATCH_DOCUMENTS = 256  # tokenised at once, on all cores


@dataclasses.dataclass(frozen=True)
class Report:
    """What preparing found.

    Attributes:
      folder: where the shards are.
      splits: per split: documents, tokens, text_bytes.
      skipped: documents that could not be used, by reason.
    """

    folder: epath.Path
    splits: dict[str, dict[str, int]]
    skipped: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{'split':<12}{'documents':>12}{'tokens':>16}{'bytes/token':>13}"]
        for name, split in self.splits.items():
            ratio = split["text_bytes"] / split["tokens"] if split["tokens"] else 0.0
            lines.append(f"{name:<12}{split['documents']:>12,}{split['tokens']:>16,}{ratio:>13.2f}")
        lines += [f"skipped     {count:>12,}  {why}" for why, count in sorted(self.skipped.items())]
        return "\n".join([*lines, f"token shards in {self.folder}"])


def _settings(config: Config) -> dict[str, Any]:
    """What the shards depend on; another value would give other shards."""
    data = config.data
    return {
        "source": data.source,
        "text_field": data.text_field,
        "validation_fraction": data.validation_fraction,
        "max_document_bytes": data.max_document_bytes,
        "vocab_size": config.model.vocab_size,
        "tokenizer": Tokenizer.load(data.tokenizer).fingerprint if data.tokenizer else "trained",
    }


def prepare(
    config: Config, output: epath.PathLike, *, log: Callable[[str], None] = print
) -> Report:
    """Writes the token shards of `config.data` to `output`, or finds that they are there.

    The folder appears under its name only when it is complete.

    Args:
      config: `data` says what to read; `model.vocab_size` sizes a new tokenizer.
      output: the folder to make.
      log: takes lines for the user.

    Raises:
      UserError: no usable text, an unreadable source or tokenizer, an `output` that holds something
        else, or a full disk. What was in `output` before is still there.
    """
    output = epath.Path(output)
    settings = _settings(config)
    if (output / shards.MANIFEST).exists():
        manifest = shards.read_manifest(output)
        if manifest["settings"] != settings:
            changed = [
                name for name in settings if manifest["settings"].get(name) != settings[name]
            ]
            raise UserError(
                f"{output} holds shards made with another {', '.join(changed)}; choose another "
                "folder, or delete this one if you don't need it"
            )
        log(f"{output} is prepared already")
        return _report(output, manifest)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty and holds no token shards; choose another folder")
    partial = output.parent / f"{output.name}.partial"
    try:
        if partial.exists():
            partial.rmtree()
        partial.mkdir(parents=True)
        manifest = _write(config, partial, settings, log)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk is full: cannot write {output}; nothing was kept") from error
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    report = _report(output, manifest)
    log(str(report))
    return report


def _report(folder: epath.Path, manifest: dict[str, Any]) -> Report:
    names = ("documents", "tokens", "text_bytes")
    splits = {
        split: {name: manifest["splits"][split][name] for name in names} for split in shards.SPLITS
    }
    return Report(folder=folder, splits=splits, skipped=manifest["skipped"])


def _write(
    config: Config, folder: epath.Path, settings: dict[str, Any], log: Callable[[str], None]
) -> dict[str, Any]:
    tokenizer = _tokenizer(config, log)
    tokenizer.save(folder / shards.TOKENIZER)
    writers = {
        split: shards.ShardWriter(folder, split, tokenizer, config.data.shard_tokens)
        for split in shards.SPLITS
    }
    skipped: Skipped = collections.Counter()
    progress = _Progress()
    for batch in _batches(documents(config.data, skipped)):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            data = document.text.encode()
            split = "validation" if _held_out(data, config.data.validation_fraction) else "train"
            writers[split].add(ids, len(data))
            progress.add(len(data), len(ids))
    progress.close()
    splits = {split: writer.finish() for split, writer in writers.items()}
    manifest = {
        "format_version": shards.FORMAT_VERSION,
        "settings": settings,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.fingerprint,
        "skipped": dict(skipped),
        "splits": splits,
    }
    if not splits["train"]["documents"]:
        reasons = ", ".join(f"{count} {why}" for why, count in skipped.items()) or "no documents"
        raise UserError(f"data.source={config.data.source} has no text to train on ({reasons})")
    (folder / shards.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _tokenizer(config: Config, log: Callable[[str], None]) -> Tokenizer:
    size = config.model.vocab_size
    if config.data.tokenizer:
        tokenizer = Tokenizer.load(config.data.tokenizer)
        if tokenizer.vocab_size != size:
            raise UserError(
                f"tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} ids, "
                f"but model.vocab_size is {size}"
            )
        return tokenizer
    log(f"training a tokenizer of {size:,} ids on {config.data.source}")
    texts = (document.text for document in documents(config.data, collections.Counter()))
    return train_tokenizer(texts, size)


def _batches(stream: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(stream, BATCH_DOCUMENTS)):
        yield batch


def _held_out(data: bytes, fraction: float) -> bool:
    """Whether a document is held out: by its contents, so that copies go the same way."""
    digest = hashlib.sha256(data).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


class _Progress:
    """One line on a terminal, rewritten twice a second."""

    def __init__(self) -> None:
        self._began = self._shown = time.monotonic()
        self._bytes = self._tokens = 0
        self._terminal = sys.stderr.isatty()

    def add(self, n_bytes: int, n_tokens: int) -> None:
        """Counts a document."""
        self._bytes += n_bytes
        self._tokens += n_tokens
        now = time.monotonic()
        if self._terminal and now - self._shown > 0.5:
            self._shown = now
            speed = self._bytes / 1e6 / (now - self._began)
            text = f"\r{self._bytes / 1e6:,.1f} MB  {self._tokens:,} tokens  {speed:.1f} MB/s"
            print(f"{text:<70}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clears the line."""
        if self._terminal:
            print("\r" + " " * 70 + "\r", end="", file=sys.stderr, flush=True)
