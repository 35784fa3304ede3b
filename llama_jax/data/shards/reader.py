"""Reads ranges, documents and packed sequences of token shards; `layout` describes the format."""

import dataclasses
import functools
import hashlib
import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from llama_jax.data.shards.block_checksums import Blocks, decode_sums
from llama_jax.data.shards.layout import (
    CRC,
    TEMPLATE,
    TOKENIZER,
    check_files,
    data_fingerprint,
    read_manifest,
    token_dtype,
)
from llama_jax.data.shards.packing import INDEX_DTYPE
from llama_jax.errors import UserError
from llama_jax.files import is_object_store, open_file, size_of
from llama_jax.text.answer_ends import count_in_splits
from llama_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TokenDataset:
    """One split of a folder of shards, as a single run of tokens or of packed sequences.

    Attributes:
      folder: folder of the shards.
      vocab_size: all ids are below this number.
      n_tokens: tokens in all shards.
      pack_len: sequence length that documents are packed for; 0: they are not packed.
      n_sequences: packed sequences in all shards.
      fingerprint: identity of the tokens in the folder.
      tokenizer_sha256: sha256 of the tokenizer that made the shards.
      template_sha256: sha256 of the template that made the shards; empty: they are plain text.
      answers: answers in all splits of the folder; 0 if the manifest does not count them.
      unended: number of answers without an end token.
    """

    folder: epath.Path
    tokenizer_sha256: str
    template_sha256: str
    answers: int
    unended: int
    vocab_size: int
    n_tokens: int
    pack_len: int
    n_sequences: int
    fingerprint: str
    _shards: tuple[dict[str, Any], ...]
    _token_starts: np.ndarray  # first token of each shard in the run of tokens, and the end
    _sequence_starts: np.ndarray  # the same for packed sequences
    # Blocks of the files that were read, by name; None: an earlier version wrote no checksums.
    _blocks: dict[str, Blocks | None] = dataclasses.field(default_factory=dict)
    # Identity of each opened file, by name.
    _identities: dict[str, object] = dataclasses.field(default_factory=dict)
    # Identifies this dataset in the cache of open files. The path is not enough, because other
    # shards may have replaced those in the folder.
    _key: object = dataclasses.field(default_factory=object)

    @classmethod
    def open(cls, folder: epath.PathLike, split: str) -> "TokenDataset":
        """Opens a split after cheap checks: manifest, tokenizer, sizes and ends of all files.

        Raises:
          UserError: the manifest is damaged, or `check_files` fails.
        """
        folder = epath.Path(folder)
        manifest = read_manifest(folder)
        check_files(folder, manifest, split)
        shards = manifest["splits"][split]["shards"]
        token_starts = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        sequence_starts = np.cumsum([0, *(shard.get("sequences", 0) for shard in shards)])
        answers, unended = count_in_splits(manifest["splits"])
        return cls(
            folder=folder,
            tokenizer_sha256=manifest["tokenizer_sha256"],
            template_sha256=manifest.get("template_sha256", ""),
            answers=answers,
            unended=unended,
            vocab_size=manifest["vocab_size"],
            n_tokens=int(token_starts[-1]),
            pack_len=manifest["settings"].get("pack_len", 0),
            n_sequences=int(sequence_starts[-1]),
            fingerprint=data_fingerprint(manifest),
            _shards=tuple(shards),
            _token_starts=token_starts,
            _sequence_starts=sequence_starts,
        )

    @property
    def packed_targets(self) -> int:
        """The number of targets that count in the loss, in all packed sequences.

        In conversations, these are the targets in answers.
        """
        return sum(
            one["answer_tokens"] if "mask_sha256" in one else one["tokens"] - one["documents"]
            for one in self._shards
        )

    @property
    def unchecked(self) -> bool:
        """Says whether an earlier version wrote some shards, without checksums of their blocks."""
        return any("crc_sha256" not in shard for shard in self._shards)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Reads the tokens start..stop of the run, across shards; fewer at the end of the run.

        Raises:
          UserError: a shard is damaged.
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
        """Yields the tokens of each document, from BOS to EOS.

        Raises:
          UserError: a shard is damaged.
        """
        for number, shard in enumerate(self._shards):
            starts = self._read(number, "idx", INDEX_DTYPE, 0, shard["documents"])
            if hashlib.sha256(starts.data).hexdigest() != shard["index_sha256"]:
                raise self._damaged(f"{shard['name']}.idx is not as it was written")
            bounds = [*starts.tolist(), shard["tokens"]]
            for start, stop in itertools.pairwise(bounds):
                yield self._shard_tokens(number, start, stop)

    def pieces(self, sequence: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Reads the pieces of a packed sequence.

        Returns:
          For each piece its n + 1 tokens, and for each of its n targets 1 if it counts in the loss,
          otherwise 0.

        Raises:
          UserError: a shard is damaged.
        """
        shard = int(self._sequence_starts.searchsorted(sequence, side="right")) - 1
        name, number = self._shards[shard]["name"], self._shards[shard]["sequences"]
        pack = functools.partial(self._read, shard, "pack", INDEX_DTYPE)
        local = sequence - int(self._sequence_starts[shard])
        count = int(pack(number, number + 1)[0])
        size = len(self._open(f"{name}.pack", INDEX_DTYPE))
        first, last = (number + 1 + int(piece) for piece in pack(local, local + 2))
        if size != number + 1 + 2 * count or not number < first <= last <= number + 1 + count:
            raise self._damaged(f"{name}.pack is inconsistent")
        starts = pack(first, last).tolist()
        inputs = pack(first + count, last + count).tolist()
        tokens = self._shards[shard]["tokens"]
        pieces = list(zip(starts, inputs, strict=True))
        if sum(inputs) > self.pack_len or any(
            not 0 <= start < start + length < tokens for start, length in pieces
        ):
            raise self._damaged(f"{name}.pack is inconsistent")
        return [
            (
                self._shard_tokens(shard, start, start + length + 1),
                self._shard_mask(shard, start + 1, start + length + 1),
            )
            for start, length in pieces
        ]

    def _shard_tokens(self, shard: int, start: int, stop: int) -> np.ndarray:
        """Reads the tokens start..stop of a shard; fewer at the end that the manifest gives."""
        stop = min(stop, self._shards[shard]["tokens"])
        tokens = self._read(shard, "bin", token_dtype(self.vocab_size), start, stop)
        if "crc_sha256" not in self._shards[shard]:  # otherwise the checksums cover the ids
            self._check_ids(shard, tokens)
        return tokens

    def _check_ids(self, shard: int, tokens: np.ndarray) -> None:
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            name = self._shards[shard]["name"]
            raise self._damaged(f"{name}.bin holds ids beyond the vocabulary of {self.vocab_size}")

    def _shard_mask(self, shard: int, start: int, stop: int) -> np.ndarray:
        if "mask_sha256" not in self._shards[shard]:
            return np.ones(stop - start, np.uint8)
        found = self._read(shard, "mask", np.dtype("|u1"), start // 8, -(-stop // 8))
        return np.unpackbits(found)[start % 8 :][: stop - start]

    def _read(self, shard: int, kind: str, dtype: np.dtype, start: int, stop: int) -> np.ndarray:
        """Reads all values start..stop of a file, and checks the blocks that hold them.

        Args:
          shard: number of the shard.
          kind: kind of the file, such as "bin".
          dtype: type of a value.
          start: first value.
          stop: one after the last value.

        Raises:
          UserError: the file cannot be read, a block is damaged, or the file was cut since it was
            opened.
        """
        name, size = f"{self._shards[shard]['name']}.{kind}", dtype.itemsize
        try:
            file = self._open(name, dtype)
        except OSError as error:
            raise self._unreadable(name, error) from error
        blocks = self._blocks_of(shard, kind, name)
        span = blocks.unchecked(start * size, stop * size) if blocks else None
        # The checksum and the values must come from the same bytes, so they are read only once.
        first, last = (span[0] // size, span[1] // size) if span else (start, stop)
        try:
            found = file[first:last]
        except OSError as error:
            raise self._unreadable(name, error) from error
        except ValueError as error:  # the file ends inside a value
            raise self._damaged(f"{name} ends early") from error
        if len(found) != last - first:
            raise self._damaged(f"{name} ends early")
        if span and blocks:
            bad = blocks.check(found.view(np.uint8), span[0])
            if bad is not None:
                if kind == "bin":
                    self._check_ids(shard, found)
                raise self._damaged(f"{name} is not as it was written, from byte {bad:,} on")
        return found[start - first : stop - first]

    def _open(self, name: str, dtype: np.dtype) -> "_FileArray":
        found = _kept_open(self._key, self.folder, name, dtype.str)
        if self._identities.setdefault(name, found.identity) != found.identity:
            # The file was closed and replaced since: the blocks of the new one are not checked yet.
            self._blocks.pop(name, None)
            self._identities[name] = found.identity
        return found

    def _blocks_of(self, shard: int, kind: str, name: str) -> Blocks | None:
        """Returns the blocks of a file; None if there are no checksums for them."""
        if name not in self._blocks:
            found: dict[str, Blocks] = {}
            described = self._shards[shard]
            if "crc_sha256" in described:
                path = f"{described['name']}.{CRC}"
                try:
                    content = (self.folder / path).read_bytes()
                except OSError as error:
                    raise self._unreadable(path, error) from error
                if hashlib.sha256(content).hexdigest() != described["crc_sha256"]:
                    raise self._damaged(f"{path} is not as it was written")
                sizes = {"bin": described["tokens"] * token_dtype(self.vocab_size).itemsize}
                if "mask_sha256" in described:
                    sizes["mask"] = -(-described["tokens"] // 8)
                found = decode_sums(content, sizes, f"{self.folder}/{path}")
            # With `setdefault`, threads that get here at the same time share one instance.
            self._blocks.setdefault(name, found.get(kind))
        return self._blocks[name]

    def _unreadable(self, name: str, error: OSError) -> UserError:
        return UserError(
            f"cannot read {self.folder / name}: {error.strerror or error}; once it can be "
            "read again, the same command continues"
        )

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.folder}/{what}: it is damaged, or was replaced since it was opened; check with "
            "llama_jax.prepare --verify"
        )

    def tokenizer(self) -> Tokenizer:
        """Loads the tokenizer that made the shards."""
        return Tokenizer.load(self.folder / TOKENIZER)

    def template(self) -> bytes:
        """Reads the chat template that made the shards, in the form of a tokenizer_config.json.

        It is empty if the shards are plain text.
        """
        return (self.folder / TEMPLATE).read_bytes() if self.template_sha256 else b""


class _FileArray:
    """An array in a file, which supports only slicing and reads only the slice.

    It is not a memory map: the pages of a map count as memory of this process until the kernel
    reclaims them, and object stores have no maps. Reading a range is as fast.
    """

    def __init__(self, path: str, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._local = not is_object_store(path)
        self._lock = threading.Lock()
        # The file stays open as long as the cache below keeps this array.
        self._file = open_file(path)
        self._length = size_of(epath.Path(path)) // self._dtype.itemsize
        status = os.fstat(self._file.fileno()) if self._local else None
        # Identifies the file itself, not its path; None: unknown, in an object store.
        self.identity = (status.st_dev, status.st_ino, status.st_mtime_ns) if status else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, where: Any) -> Any:
        if not isinstance(where, slice):
            return self[where : where + 1][0]
        start, stop, _ = where.indices(self._length)
        offset, size = start * self._dtype.itemsize, max(0, stop - start) * self._dtype.itemsize
        if self._local:  # `pread` has its own offset, so threads can share the file
            return np.frombuffer(os.pread(self._file.fileno(), size, offset), self._dtype)
        with self._lock:  # otherwise threads would share the position, too
            self._file.seek(offset)
            return np.frombuffer(self._file.read(size), self._dtype)


_open_array = _FileArray


# The size is below the usual limit of open files; the least recently used file is closed.
@functools.lru_cache(maxsize=256)
def _kept_open(key: object, folder: epath.Path, name: str, dtype: str) -> _FileArray:
    """Opens a file of the dataset that `key` identifies, and keeps it open."""
    return _open_array(str(folder / name), dtype)
