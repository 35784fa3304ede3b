"""Token shards on disk: the format, and a reader of ranges.

A folder of shards holds
  manifest.json          what is in it, with the checksum of every file, and one of its own
  tokenizer.model        the tokenizer that made it
  train-00000-000.bin    token ids, little-endian uint16 or uint32: BOS document EOS, one by one
  train-00000-000.idx    where each document begins, in tokens, little-endian int64
  train-00000-000.pack   with data.packing=best_fit: which pieces make a sequence (`pack_documents`)
  train-00000-000.mask   with data.template: of each token a bit (the highest of a byte first), 1 if
                         it is a target that counts
  chat_template.json     with data.template: the template, in the form of tokenizer_config.json
and the same for `validation`. The first number is the part of the source, the second counts its
shards. A document lies in one shard.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from etils import epath

from llama_jax.data.packing import INDEX_DTYPE
from llama_jax.data.tokenizer import Tokenizer
from llama_jax.errors import UserError
from llama_jax.files import is_object_store

FORMAT_VERSION = 2  # 1: no checksum of the manifest, none of the ends of files
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
TEMPLATE = "chat_template.json"
SPLITS = ("train", "validation")
# What opening reads of each file's beginning and end: enough to tell one shard from another, and
# little for 10,000 of them. Bytes between are read by `verify` only.
END_BYTES = 4096
_THREADS = 16


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type on disk that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """The manifest's file: its first key is the sha256 of the file, with nothing in that place."""
    text = json.dumps({"sha256": "", **manifest} | {"sha256": ""}, indent=1) + "\n"
    return text.replace('""', f'"{hashlib.sha256(text.encode()).hexdigest()}"', 1).encode()


def _is_whole(data: bytes, manifest: dict[str, Any]) -> bool:
    digest = str(manifest.get("sha256", ""))
    return hashlib.sha256(data.replace(digest.encode(), b"", 1)).hexdigest() == digest


def read_manifest(folder: epath.PathLike) -> dict[str, Any]:
    """The manifest of a folder of shards, checked for form.

    Raises:
      UserError: there is none, or it is damaged, of another version, or names files elsewhere.
    """
    path = epath.Path(folder) / MANIFEST
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
    except FileNotFoundError as error:
        raise UserError(f"no token shards in {folder}; make them with llama_jax.prepare") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    try:
        version = manifest["format_version"]
        if version not in (1, FORMAT_VERSION):
            raise UserError(
                f"{path} has format {version}, this version reads {FORMAT_VERSION}; prepare the "
                "data again"
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
    if version > 1 and not _is_whole(data, manifest):
        raise UserError(
            f"{path} is not as it was written: it is damaged, or was edited; restore it or prepare "
            "the data again"
        )
    return manifest


def source_folders(folder: epath.PathLike) -> dict[str, epath.Path]:
    """The sources that are prepared in a folder: itself, called '', or folders below it, by name.

    Raises:
      UserError: there is none.
    """
    folder = epath.Path(folder)
    if (folder / MANIFEST).exists():
        return {"": folder}
    found = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir(), key=str):
            if not path.name.endswith(".partial") and (path / MANIFEST).exists():
                found[path.name] = path
    if not found:
        raise UserError(f"no token shards in {folder}; make them with llama_jax.prepare")
    return found


def fingerprint(manifest: dict[str, Any]) -> str:
    """Identity of the tokens: sha256 over the checksums of all shards, tokenizer and template."""
    parts = [manifest["tokenizer_sha256"]]
    if template := manifest.get("template_sha256"):
        parts.append(template)
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            parts += [shard["sha256"], shard.get("pack_sha256", "")]
            if "mask_sha256" in shard:
                parts.append(shard["mask_sha256"])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def verify(folder: epath.PathLike) -> list[str]:
    """Names of files whose contents are not what the manifest says; reads everything.

    Raises:
      UserError: there is no manifest to compare with.
    """
    folder = epath.Path(folder)
    manifest = read_manifest(folder)
    expected = {TOKENIZER: manifest["tokenizer_sha256"]}
    if "template_sha256" in manifest:
        expected[TEMPLATE] = manifest["template_sha256"]
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            expected[f"{shard['name']}.bin"] = shard["sha256"]
            expected[f"{shard['name']}.idx"] = shard["index_sha256"]
            if "pack_sha256" in shard:
                expected[f"{shard['name']}.pack"] = shard["pack_sha256"]
            if "mask_sha256" in shard:
                expected[f"{shard['name']}.mask"] = shard["mask_sha256"]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda name: _sha256(folder / name), expected))
    return [name for name, digest in zip(expected, found, strict=True) if digest != expected[name]]


def _open(path: str) -> IO[bytes]:
    """Unbuffered where it is local, for 10,000 files: epath's own `open` takes twice as long."""
    return epath.Path(path).open("rb") if is_object_store(path) else open(path, "rb", 0)


def ends_sha256(path: epath.PathLike, size: int) -> str:
    """Checksum of the first and the last `END_BYTES` of a file of so many bytes.

    Raises:
      OSError: it cannot be read.
    """
    with _open(os.fspath(path)) as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(0, size - END_BYTES))
        digest.update(file.read(END_BYTES))
    return digest.hexdigest()


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
    """One split of a folder of shards, as a single run of tokens, or of packed sequences.

    Attributes:
      folder: where it lies.
      vocab_size: ids are below it.
      n_tokens: tokens in all shards.
      pack_len: sequence length that documents are packed for; 0 if they are not.
      n_sequences: packed sequences in all shards.
      fingerprint: identity of the folder's tokens.
      tokenizer_sha256: of the tokenizer that made them.
      template_sha256: of the template that made them; empty: they are plain text.
    """

    folder: epath.Path
    tokenizer_sha256: str
    template_sha256: str
    vocab_size: int
    n_tokens: int
    pack_len: int
    n_sequences: int
    fingerprint: str
    _shards: tuple[dict[str, Any], ...]
    _token_starts: np.ndarray  # of each shard in the run of tokens, and the end
    _sequence_starts: np.ndarray  # the same of the packed sequences

    @classmethod
    def open(cls, folder: epath.PathLike, split: str) -> "TokenDataset":
        """Opens a split after cheap checks: manifest, tokenizer, sizes and ends of all files.

        Raises:
          UserError: a file is missing, has another size, begins or ends otherwise than it was
            written, or the tokenizer is not the one that made the shards.
        """
        folder = epath.Path(folder)
        manifest = read_manifest(folder)
        if _sha256(folder / TOKENIZER) != manifest["tokenizer_sha256"]:
            raise UserError(
                f"{folder / TOKENIZER} is not the tokenizer that made these shards; put back the "
                f"one with sha256 {manifest['tokenizer_sha256']}, or prepare the data again"
            )
        template = manifest.get("template_sha256", "")
        if template and _sha256(folder / TEMPLATE) != template:
            raise UserError(
                f"{folder / TEMPLATE} is missing, or not the template that made these shards; put "
                "it back, or prepare the data again"
            )
        dtype = token_dtype(manifest["vocab_size"])
        shards = manifest["splits"][split]["shards"]
        sizes = file_sizes(folder)
        for shard in shards:
            _check_size(folder, sizes, f"{shard['name']}.bin", shard["tokens"] * dtype.itemsize)
            _check_size(
                folder, sizes, f"{shard['name']}.idx", shard["documents"] * INDEX_DTYPE.itemsize
            )
            if "sequences" in shard:
                _check_size(folder, sizes, f"{shard['name']}.pack", None)
            if "mask_sha256" in shard:
                _check_size(folder, sizes, f"{shard['name']}.mask", -(-shard["tokens"] // 8))
        _check_ends(folder, sizes, shards)
        token_starts = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        sequence_starts = np.cumsum([0, *(shard.get("sequences", 0) for shard in shards)])
        return cls(
            folder=folder,
            tokenizer_sha256=manifest["tokenizer_sha256"],
            template_sha256=template,
            vocab_size=manifest["vocab_size"],
            n_tokens=int(token_starts[-1]),
            pack_len=manifest["settings"].get("pack_len", 0),
            n_sequences=int(sequence_starts[-1]),
            fingerprint=fingerprint(manifest),
            _shards=tuple(shards),
            _token_starts=token_starts,
            _sequence_starts=sequence_starts,
        )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of the run, across shard borders; shorter at the end.

        Raises:
          UserError: an id beyond the vocabulary, which only a damaged shard holds.
        """
        shard = int(self._token_starts.searchsorted(start, side="right")) - 1
        parts = []
        while start < stop and shard < len(self._shards):
            first = int(self._token_starts[shard])
            parts.append(self._shard_tokens(shard, start - first, stop - first))
            shard += 1
            start = int(self._token_starts[shard])
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, np.uint16)

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document, from BOS to EOS.

        Raises:
          UserError: a damaged shard.
        """
        for number, shard in enumerate(self._shards):
            starts = self._read(f"{shard['name']}.idx", INDEX_DTYPE, 0, shard["documents"])
            bounds = [*starts.tolist(), shard["tokens"]]
            for start, stop in itertools.pairwise(bounds):
                yield self._shard_tokens(number, start, stop)

    def pieces(self, sequence: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The pieces of a packed sequence: n + 1 tokens, and of the n targets which count.

        Raises:
          UserError: a damaged shard.
        """
        shard = int(self._sequence_starts.searchsorted(sequence, side="right")) - 1
        name, number = self._shards[shard]["name"], self._shards[shard]["sequences"]
        pack = functools.partial(self._read, f"{name}.pack", INDEX_DTYPE)
        local = sequence - int(self._sequence_starts[shard])
        count = int(pack(number, number + 1)[0])
        size = self._length(f"{name}.pack", INDEX_DTYPE)
        first, last = (number + 1 + int(piece) for piece in pack(local, local + 2))
        if size != number + 1 + 2 * count or not number < first <= last <= number + 1 + count:
            raise self._damaged(f"{name}.pack does not fit together")
        starts = pack(first, last).tolist()
        inputs = pack(first + count, last + count).tolist()
        tokens = self._shards[shard]["tokens"]
        pieces = list(zip(starts, inputs, strict=True))
        if sum(inputs) > self.pack_len or any(
            not 0 <= start < start + length < tokens for start, length in pieces
        ):
            raise self._damaged(f"{name}.pack does not fit together")
        return [
            (
                self._shard_tokens(shard, start, start + length + 1),
                self._shard_mask(shard, start + 1, start + length + 1),
            )
            for start, length in pieces
        ]

    def _shard_tokens(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of a shard; shorter only at its end, as the manifest has it."""
        name = f"{self._shards[shard]['name']}.bin"
        stop = min(stop, self._shards[shard]["tokens"])
        tokens = self._read(name, token_dtype(self.vocab_size), start, stop)
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            raise self._damaged(f"{name} holds ids beyond the vocabulary of {self.vocab_size}")
        return tokens

    def _shard_mask(self, shard: int, start: int, stop: int) -> np.ndarray:
        if "mask_sha256" not in self._shards[shard]:
            return np.ones(stop - start, np.uint8)
        name = f"{self._shards[shard]['name']}.mask"
        found = self._read(name, np.dtype("|u1"), start // 8, -(-stop // 8))
        return np.unpackbits(found)[start % 8 :][: stop - start]

    def _read(self, name: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        """Values start..stop of a file, all of them.

        Raises:
          UserError: the disk does not give them, or the file was cut since it was opened.
        """
        with self._named(name):
            found = _open_array(str(self.folder / name), dtype.str)[start:stop]
        if len(found) != stop - start:
            raise self._damaged(f"{name} ends early")
        return found

    def _length(self, name: str, dtype: np.dtype) -> int:
        with self._named(name):
            return len(_open_array(str(self.folder / name), dtype.str))

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Gives the file's name to what goes wrong with it."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot read {self.folder / name}: {error.strerror or error}; when it can be read "
                "again, the same command goes on"
            ) from error
        except ValueError as error:  # half a value
            raise self._damaged(f"{name} ends early") from error

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.folder}/{what}: it is damaged; check with llama_jax.prepare --verify"
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the shards."""
        return Tokenizer.load(self.folder / TOKENIZER)

    def template(self) -> bytes:
        """The chat template that made the shards, as tokenizer_config.json; empty: none did."""
        return (self.folder / TEMPLATE).read_bytes() if self.template_sha256 else b""


class _FileArray:
    """As much of an array as slicing, read from a file by ranges.

    Not a memory map, whose pages count as this process's memory until the kernel wants them back,
    and which object stores do not have; reading a range is as fast.
    """

    def __init__(self, path: str, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._local = not is_object_store(path)
        self._lock = threading.Lock()
        # Stays open as long as the cache below keeps it.
        self._file = _open(path)
        self._length = epath.Path(path).stat().length // self._dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: Any) -> Any:
        if not isinstance(where, slice):
            return self[where : where + 1][0]
        start, stop, _ = where.indices(self._length)
        offset, size = start * self._dtype.itemsize, max(0, stop - start) * self._dtype.itemsize
        if self._local:  # at an offset of its own: threads share the file
            return np.frombuffer(os.pread(self._file.fileno(), size, offset), self._dtype)
        with self._lock:  # here they share its position, too
            self._file.seek(offset)
            return np.frombuffer(self._file.read(size), self._dtype)


# Fewer than the files that a process may usually have open; the least recently used is closed.
_open_array = functools.lru_cache(maxsize=256)(_FileArray)


def file_sizes(folder: epath.Path) -> dict[str, int]:
    """Bytes of each file of a folder, in one listing."""
    if is_object_store(folder):
        return {path.name: path.stat().length for path in folder.iterdir()}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}


def _check_size(folder: epath.Path, sizes: dict[str, int], name: str, expected: int | None) -> None:
    if name not in sizes:
        raise UserError(f"{folder / name} is missing; the manifest lists it")
    if expected is not None and sizes[name] != expected:
        raise UserError(
            f"{folder / name} has {sizes[name]} bytes, the manifest says {expected}: it is "
            "truncated or replaced; restore it or prepare the data again"
        )


def _check_ends(folder: epath.Path, sizes: dict[str, int], shards: list[dict[str, Any]]) -> None:
    """Compares the ends of all files; shards of a version before have no checksums of theirs."""
    expected = {
        f"{shard['name']}.{kind}": digest
        for shard in shards
        for kind, digest in shard.get("ends_sha256", {}).items()
    }

    def first_other(names: list[str]) -> str:
        for name in names:
            try:
                if ends_sha256(f"{folder}/{name}", sizes[name]) != expected[name]:
                    return name
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"cannot read {folder / name}: {reason}") from error
        return ""

    # Many files to a task: to hand over a single one takes longer than to read its ends.
    names, each = list(expected), -(-len(expected) // _THREADS) or 1
    parts = [names[start : start + each] for start in range(0, len(names), each)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for name in filter(None, pool.map(first_other, parts)):
            raise UserError(
                f"{folder / name} is not the file that the manifest means: it is damaged or "
                "replaced; restore it or prepare the data again"
            )
