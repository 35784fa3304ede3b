"""Writes token shards; `layout` describes the format, `reader` reads it."""

import hashlib
from typing import Any

import numpy as np
from etils import epath

from llama_jax.data.shards.block_checksums import BlockSums, encode_sums
from llama_jax.data.shards.layout import CRC, ends_sha256, token_dtype
from llama_jax.data.shards.packing import INDEX_DTYPE, pack_documents
from llama_jax.data.sources.part import Example
from llama_jax.files import size_of


class ShardWriter:
    """Writes the shards of one split of one part, one after another, with little memory."""

    def __init__(
        self, folder: epath.Path, name: str, vocab_size: int, shard_tokens: int, pack_len: int
    ) -> None:
        """Begins without a shard.

        Args:
          folder: existing folder to write to.
          name: beginning of the names of the shards, which end in `-000`, `-001`, ..
          vocab_size: number of ids; determines the type on disk.
          shard_tokens: a shard is closed when it has at least this many tokens.
          pack_len: sequence length to pack whole documents for; 0: no packing.
        """
        self._folder, self._name = folder, name
        self._shard_tokens, self._pack_len = shard_tokens, pack_len
        self._vocab_size, self._dtype = vocab_size, token_dtype(vocab_size)
        self._file: Any = None
        self._digest, self._sums = hashlib.sha256(), BlockSums()
        self._offsets: list[int] = []
        self._counts: list[np.ndarray] = []
        self._tokens = 0
        self._shards: list[dict[str, Any]] = []
        self._text_bytes = 0
        self._answers = self._unended = 0

    def add(self, example: Example) -> None:
        """Appends a document; either all documents of a split have `counts`, or no document has.

        Raises:
          ValueError: an id is negative, or not below the size of the vocabulary.
        """
        ids = example.ids
        # Readers rely on this check: they do not check the ids in blocks that are undamaged.
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise ValueError(
                f"ids from {ids.min()} to {ids.max()} do not fit a vocabulary of {self._vocab_size}"
            )
        if self._file is None:
            self._file = (self._folder / f"{self._next_name()}.bin").open("wb")
        self._offsets.append(self._tokens)
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._sums.add(data)
        self._tokens += len(ids)
        self._text_bytes += example.text_bytes
        self._answers += example.answers
        self._unended += example.unended
        if example.counts is not None:
            self._counts.append(example.counts)
        if self._tokens >= self._shard_tokens:
            self._close_shard()

    def _next_name(self) -> str:
        return f"{self._name}-{len(self._shards):03d}"

    def _close_shard(self) -> None:
        self._file.close()
        name = self._next_name()
        shard: dict[str, Any] = {
            "name": name,
            "tokens": self._tokens,
            "documents": len(self._offsets),
            "sha256": self._digest.hexdigest(),
            "index_sha256": self._write(f"{name}.idx", np.asarray(self._offsets, INDEX_DTYPE)),
        }
        if self._pack_len:
            pack, sequences = pack_documents(self._offsets, self._tokens, self._pack_len)
            shard |= {"sequences": sequences, "pack_sha256": self._write(f"{name}.pack", pack)}
        sums = {"bin": self._sums}
        if self._counts:
            counts = np.concatenate(self._counts)
            never = counts[self._offsets]  # the first token of a document is not a target
            mask = np.packbits(counts)
            shard |= {
                "answer_tokens": int(counts.sum() - never.sum()),
                "mask_sha256": self._write(f"{name}.mask", mask),
            }
            sums["mask"] = BlockSums()
            sums["mask"].add(mask.tobytes())
        shard["crc_sha256"] = self._write(f"{name}.{CRC}", encode_sums(sums))
        kinds = ["bin", "idx", *(kind for kind in ("pack", "mask") if f"{kind}_sha256" in shard)]
        shard["ends_sha256"] = {}
        for kind in kinds:
            path = epath.Path(self._folder) / f"{name}.{kind}"
            shard["ends_sha256"][kind] = ends_sha256(path, size_of(path))
        self._shards.append(shard)
        self._file, self._digest, self._sums = None, hashlib.sha256(), BlockSums()
        self._offsets, self._counts, self._tokens = [], [], 0

    def _write(self, name: str, content: np.ndarray | bytes) -> str:
        data = content if isinstance(content, bytes) else content.tobytes()
        (self._folder / name).write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    def finish(self) -> dict[str, Any]:
        """Closes the last shard, and returns the part of the manifest about these shards."""
        if self._offsets:
            self._close_shard()
        return {
            "documents": sum(shard["documents"] for shard in self._shards),
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "answer_tokens": sum(shard.get("answer_tokens", 0) for shard in self._shards),
            "text_bytes": self._text_bytes,
            "answers": self._answers,
            "unended_answers": self._unended,
            "shards": self._shards,
        }
