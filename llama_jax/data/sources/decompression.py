"""A file as a stream of UTF-8 bytes: decompressed, and decoded where it is in UTF-16 or UTF-32.

What a file is compressed with is decided by its first bytes; its name does not matter.
"""

import bz2
import codecs
import dataclasses
import gzip
import io
import lzma
import zlib
from typing import IO, Any

import zstandard

MAGIC_BYTES = 16  # enough to tell every kind of compression
_BROKEN = (
    *(gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError, EOFError),
    *(ValueError, UnicodeError),
)
# The longer marks first: UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class Damaged(Exception):
    """A compressed file cannot be decompressed any further."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A file that is open.

    Attributes:
      file: its contents in UTF-8, decompressed; the file itself where it is stored like that.
      compression: such as `gzip`; empty: none.
      encoding: `UTF-16` or `UTF-32` where the file is decoded; empty: its bytes are as stored.
    """

    file: Any
    compression: str
    encoding: str

    @property
    def as_stored(self) -> bool:
        """Whether the stream has the bytes of the file, so that it can be read from the middle."""
        return not self.compression and not self.encoding


def compression_of(magic: bytes) -> str:
    """What a file that begins with these bytes is compressed with; empty: with nothing known."""
    if magic.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    skippable = magic[1:4] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5  # a zstandard frame, too
    if magic.startswith(b"\x28\xb5\x2f\xfd") or skippable:
        return "zstandard"
    if magic.startswith(b"\xfd7zXZ\0"):
        return "xz"
    if magic.startswith(b"BZh") and magic[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return "bzip2"
    return ""


def open_stream(raw: IO[bytes]) -> Opened:
    """The contents of an open binary file, from its beginning.

    Reading from it raises `Damaged` where it cannot be decompressed.
    """
    magic = raw.read(MAGIC_BYTES)
    raw.seek(0)
    compression = compression_of(magic)
    file: Any = raw
    if compression:
        file = io.BufferedReader(_Stream(_decompressor(raw, compression)), 1 << 16)
        try:
            magic = file.peek(4)
        except Damaged:  # reading raises it again
            magic = b""
    encoding = next((name for mark, name in _MARKS if magic.startswith(mark) and magic != mark), "")
    if encoding:
        file = io.BufferedReader(_Stream(_Decoder(file, encoding)), 1 << 16)
    return Opened(file, compression, encoding)


def _decompressor(raw: IO[bytes], compression: str) -> Any:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if compression == "zstandard":
        return _Zstandard(raw)
    if compression == "xz":
        return lzma.LZMAFile(raw)
    return bz2.BZ2File(raw)


class _Zstandard:
    """Frames of zstandard, one after another, as `cat a.zst b.zst` makes them.

    The library's own reader takes a file that is cut within a frame for a whole one.
    """

    PIECE = 1024  # bytes that are decompressed at once, as they may become 30,000 times as many

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._decompressor = raw, zstandard.ZstdDecompressor()
        self._frame: Any = None  # that is not at its end
        self._stored = self._left = memoryview(b"")

    def read1(self, size: int) -> bytes:
        while not self._left:
            self._stored = self._stored or memoryview(self._raw.read(1 << 16))
            if not self._stored:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return b""
            piece, rest = self._stored[: self.PIECE], self._stored[self.PIECE :]
            self._frame = self._frame or self._decompressor.decompressobj()
            self._left = memoryview(self._frame.decompress(piece))
            if self._frame.eof:
                rest = self._stored[len(piece) - len(self._frame.unused_data) :]
                self._frame = None
            self._stored = rest
        taken, self._left = bytes(self._left[:size]), self._left[size:]
        return taken


class _Stream(io.RawIOBase):
    """What a decompressor or decoder gives; each of its failures is `Damaged`, then and later."""

    def __init__(self, source: Any) -> None:
        self._source, self._failure = source, ""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._failure:
            raise Damaged(self._failure)
        try:
            piece = self._source.read1(len(buffer))  # all that was read before a failure
        except OSError as error:
            if error.errno is not None:  # the disk's, not the decompressor's
                raise
            self._failure = str(error) or "damaged"
            raise Damaged(self._failure) from error
        except _BROKEN as error:
            self._failure = str(error) or "damaged"
            raise Damaged(self._failure) from error
        buffer[: len(piece)] = piece
        return len(piece)


class _Decoder:
    """A stream of UTF-16 or UTF-32 as UTF-8; what is invalid in it is invalid in UTF-8, too."""

    def __init__(self, file: Any, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._left, self._ended = b"", False

    def read1(self, size: int) -> bytes:
        while not self._left and not self._ended:
            piece = self._file.read(1 << 16)
            self._ended = not piece
            try:
                text = self._decoder.decode(piece, final=self._ended)
            except UnicodeDecodeError:  # where the next letter begins is not known
                text, self._ended = "", True
                self._left = b"\xff"
            self._left = text.encode("utf-8", "surrogatepass") + self._left
        taken, self._left = self._left[:size], self._left[size:]
        return taken
