"""Token shards on disk: the format, its writer, and a reader over memory maps.

A folder of shards holds
  manifest.json      what is in it, with the checksum of every file
  tokenizer.model    the tokenizer that made it
  train-00000.bin    token ids, little-endian uint16 or uint32: BOS document EOS, one after another
  train-00000.idx    where each document begins, in tokens, little-endian int64
and the same for `validation`. A document lies in one shard.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
SPLITS = ("train", "validation")
INDEX_DTYPE = np.dtype("<i8")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type on disk that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes the shards of one split, one after another."""

    def __init__(
        self, folder: epath.Path, split: str, tokenizer: Tokenizer, shard_tokens: int
    ) -> None:
        """Starts an empty split.

        Args:
          folder: where to; must exist.
          split: name of the split.
          tokenizer: gives BOS, EOS and the type on disk.
          shard_tokens: a shard is closed once it has so many tokens.
        """
        self._folder, self._split, self._tokenizer = folder, split, tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._arrays: list[np.ndarray] = []
        self._offsets: list[int] = []
        self._tokens = 0
        self._shards: list[dict[str, Any]] = []
        self._text_bytes = 0

    def add(self, ids: Sequence[int], text_bytes: int) -> None:
        """Appends a document.

        Args:
          ids: its tokens, without BOS and EOS.
          text_bytes: length of its text in UTF-8.
        """
        self._offsets.append(self._tokens)
        document = np.empty(len(ids) + 2, self._dtype)
        document[0], document[1:-1], document[-1] = (
            self._tokenizer.bos_id,
            ids,
            self._tokenizer.eos_id,
        )
        self._arrays.append(document)
        self._tokens += len(document)
        self._text_bytes += text_bytes
        if self._tokens >= self._shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        name = f"{self._split}-{len(self._shards):05d}"
        tokens = np.concatenate(self._arrays).tobytes()
        index = np.asarray(self._offsets, INDEX_DTYPE).tobytes()
        (self._folder / f"{name}.bin").write_bytes(tokens)
        (self._folder / f"{name}.idx").write_bytes(index)
        self._shards.append(
            {
                "name": name,
                "tokens": self._tokens,
                "documents": len(self._offsets),
                "sha256": hashlib.sha256(tokens).hexdigest(),
                "index_sha256": hashlib.sha256(index).hexdigest(),
            }
        )
        self._arrays, self._offsets, self._tokens = [], [], 0

    def finish(self) -> dict[str, Any]:
        """Closes the last shard; returns the split's part of the manifest."""
        if self._offsets:
            self._close_shard()
        return {
            "documents": sum(shard["documents"] for shard in self._shards),
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "text_bytes": self._text_bytes,
            "shards": self._shards,
        }


def read_manifest(folder: epath.PathLike) -> dict[str, Any]:
    """The manifest of a folder of shards, checked for form.

    Raises:
      UserError: there is none, or it is damaged, of another version, or names files elsewhere.
    """
    path = epath.Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"no token shards in {folder}; make them with llama_jax.prepare") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    try:
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {manifest['format_version']}, this version reads "
                f"{FORMAT_VERSION}; prepare the data again"
            )
        manifest["tokenizer_sha256"], manifest["vocab_size"], manifest["settings"]
        for split in SPLITS:
            for shard in manifest["splits"][split]["shards"]:
                shard["tokens"], shard["documents"], shard["sha256"], shard["index_sha256"]
                if epath.Path(shard["name"]).name != shard["name"]:
                    raise UserError(f"{path} names a shard outside its folder: {shard['name']!r}")
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged: {error!r} is missing; prepare the data again"
        ) from error
    return manifest


def fingerprint(manifest: dict[str, Any]) -> str:
    """Identity of the tokens: sha256 over the checksums of all shards and of the tokenizer."""
    parts = [manifest["tokenizer_sha256"]]
    for split in SPLITS:
        parts += [shard["sha256"] for shard in manifest["splits"][split]["shards"]]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def verify(folder: epath.PathLike) -> list[str]:
    """Names of files whose contents are not what the manifest says; reads everything.

    Raises:
      UserError: there is no manifest to compare with.
    """
    folder = epath.Path(folder)
    manifest = read_manifest(folder)
    expected = {TOKENIZER: manifest["tokenizer_sha256"]}
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            expected[f"{shard['name']}.bin"] = shard["sha256"]
            expected[f"{shard['name']}.idx"] = shard["index_sha256"]
    return [name for name, digest in expected.items() if _sha256(folder / name) != digest]


def _sha256(path: epath.Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class TokenDataset:
    """One split of a folder of shards, as a single run of tokens.

    Attributes:
      folder: where it lies.
      vocab_size: ids are below it.
      n_tokens: tokens in all shards.
      fingerprint: identity of the folder's tokens.
    """

    folder: epath.Path
    vocab_size: int
    n_tokens: int
    fingerprint: str
    _names: tuple[str, ...]
    _maps: tuple[np.ndarray, ...]
    _starts: np.ndarray  # of each shard in the run of tokens, and the end

    @classmethod
    def open(cls, folder: epath.PathLike, split: str) -> "TokenDataset":
        """Opens a split after cheap checks: manifest, sizes of all files, tokenizer.

        Raises:
          UserError: a file is missing, has another size, or the tokenizer is not the one that made
            the shards.
        """
        folder = epath.Path(folder)
        manifest = read_manifest(folder)
        if _sha256(folder / TOKENIZER) != manifest["tokenizer_sha256"]:
            raise UserError(
                f"{folder / TOKENIZER} is not the tokenizer that made these shards; put back the "
                f"one with sha256 {manifest['tokenizer_sha256']}, or prepare the data again"
            )
        dtype = token_dtype(manifest["vocab_size"])
        shards = manifest["splits"][split]["shards"]
        maps = []
        for shard in shards:
            _check_size(folder / f"{shard['name']}.bin", shard["tokens"] * dtype.itemsize)
            _check_size(folder / f"{shard['name']}.idx", shard["documents"] * INDEX_DTYPE.itemsize)
            maps.append(np.memmap(folder / f"{shard['name']}.bin", dtype, "r"))
        starts = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        return cls(
            folder=folder,
            vocab_size=manifest["vocab_size"],
            n_tokens=int(starts[-1]),
            fingerprint=fingerprint(manifest),
            _names=tuple(shard["name"] for shard in shards),
            _maps=tuple(maps),
            _starts=starts,
        )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of the run, across shard borders; shorter at the end.

        Raises:
          UserError: an id beyond the vocabulary, which only a damaged shard holds.
        """
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        while start < stop and shard < len(self._maps):
            first = int(self._starts[shard])
            parts.append(self._maps[shard][start - first : stop - first])
            if len(parts[-1]) and int(parts[-1].max()) >= self.vocab_size:
                raise UserError(
                    f"{self.folder / self._names[shard]}.bin holds ids beyond the vocabulary of "
                    f"{self.vocab_size}: it is damaged; check with llama_jax.prepare --verify"
                )
            shard += 1
            start = int(self._starts[shard])
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards."""
        return Tokenizer.load(self.folder / TOKENIZER)


def _check_size(path: epath.Path, expected: int) -> None:
    if not path.exists():
        raise UserError(f"{path} is missing; the manifest lists it")
    size = path.stat().length
    if size != expected:
        raise UserError(
            f"{path} has {size} bytes, the manifest says {expected}: it is truncated or replaced; "
            "restore it or prepare the data again"
        )
