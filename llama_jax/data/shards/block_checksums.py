"""Checksums of the blocks of a file, for shards that are read by ranges.

To compare a checksum of the whole file, a reader would have to read all of it before the first
batch. With a checksum for each block, it checks only what it reads: when it first needs a block, it
reads the whole block, compares its CRC-32, and remembers that the block is undamaged.
"""

import json
import zlib

import numpy as np

from llama_jax.errors import as_user_error, check_type, require
from llama_jax.files import parse_json

# Larger blocks slow down the first batches, since each of their rows reads one or two blocks;
# smaller blocks need more checksums (5 bytes in memory for each). `benchmarks/data.py` measures it.
BLOCK_BYTES = 1 << 16
_MULTIPLE = 8  # bytes; so that no value lies in two blocks


class BlockSums:
    """Computes the CRC-32 of each block of a file that is written piece by piece."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        """Starts at the beginning of a file."""
        self._block_bytes = block_bytes
        self._sums: list[int] = []  # of complete blocks
        self._sum, self._filled = 0, 0

    def add(self, data: bytes) -> None:
        """Adds the next bytes of the file."""
        start = 0
        while start < len(data):
            piece = memoryview(data)[start : start + self._block_bytes - self._filled]
            self._sum = zlib.crc32(piece, self._sum)
            self._filled += len(piece)
            start += len(piece)
            if self._filled == self._block_bytes:
                self._sums.append(self._sum)
                self._sum, self._filled = 0, 0

    def hex(self) -> str:
        """Returns eight hexadecimal digits for each block; the last block may be shorter."""
        sums = [*self._sums, self._sum] if self._filled else self._sums
        return np.asarray(sums, ">u4").tobytes().hex()


def encode_sums(sums: dict[str, BlockSums], block_bytes: int = BLOCK_BYTES) -> bytes:
    """Returns the contents of a `.crc.json` file: the checksums of several files, by their kind."""
    described = {"block_bytes": block_bytes, **{kind: one.hex() for kind, one in sums.items()}}
    return json.dumps(described).encode() + b"\n"


class Blocks:
    """The blocks of a file, and which of them this process has checked.

    Threads may share an instance: two threads that check the same block at the same time only do
    the work twice.
    """

    def __init__(self, sums: np.ndarray, block_bytes: int, size: int) -> None:
        """Begins with no checked block.

        Args:
          sums: CRC-32 of each block.
          block_bytes: bytes in each block except the last.
          size: bytes in the file.
        """
        self._sums, self._bytes, self._size = sums, block_bytes, size
        self._good = bytearray(len(sums))

    def unchecked(self, start: int, stop: int) -> tuple[int, int] | None:
        """Returns the range of whole blocks around start..stop; None if all of them are checked.

        Both ranges are in bytes.
        """
        first, last = start // self._bytes, -(-stop // self._bytes)
        if self._good.find(0, first, last) < 0:
            return None
        return first * self._bytes, min(last * self._bytes, self._size)

    def check(self, data: np.ndarray, start: int) -> int | None:
        """Compares blocks with their checksums, and remembers the undamaged ones.

        Args:
          data: bytes of whole blocks.
          start: position of the first byte in the file.

        Returns:
          Position in the file of the first damaged block; None: all blocks are undamaged.
        """
        for at in range(0, len(data), self._bytes):
            number = (start + at) // self._bytes
            if self._good[number]:
                continue
            if zlib.crc32(data[at : at + self._bytes].data) != self._sums[number]:
                return start + at
            self._good[number] = 1
        return None


def decode_sums(content: bytes, sizes: dict[str, int], name: str) -> dict[str, Blocks]:
    """Returns the blocks of each file that a `.crc.json` file describes.

    Args:
      content: contents of the `.crc.json` file.
      sizes: bytes in each described file, by its kind.
      name: name of the `.crc.json` file, for errors.

    Raises:
      UserError: the contents are malformed, or do not fit the sizes.
    """
    described = parse_json(content, name)
    with as_user_error(name):
        block_bytes = check_type(f"block_bytes of {name}", described["block_bytes"], int)
        good = block_bytes > 0 and block_bytes % _MULTIPLE == 0
        require(good, f"{name} has blocks of {block_bytes} bytes")
        found = {}
        for kind, size in sizes.items():
            sums = np.frombuffer(bytes.fromhex(described[kind]), ">u4").astype(np.uint32)
            blocks = -(-size // block_bytes)
            require(len(sums) == blocks, f"{name} has {len(sums)} checksums for {blocks} blocks")
            found[kind] = Blocks(sums, block_bytes, size)
        return found
