"""Opens a file as a stream of UTF-8 bytes: decompresses it, and decodes UTF-16 and UTF-32.

The first bytes of a file decide how it is compressed; its name does not matter.
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

MAGIC_BYTES = 16  # enough to recognise every kind of compression
_BROKEN = (
    *(gzip.BadGzipFile, zlib.error, zstandard.ZstdError, lzma.LZMAError, EOFError),
    *(ValueError, UnicodeError),
)
# The longer marks come first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class Damaged(Exception):
    """Raised when a compressed file cannot be decompressed any further."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """An open file.

    Attributes:
      file: a stream of the contents in UTF-8; the file itself if it is stored like that.
      compression: such as `gzip`; empty: not compressed.
      encoding: `UTF-16` or `UTF-32` if the stream decodes the file; empty: it does not.
    """

    file: Any
    compression: str
    encoding: str

    @property
    def as_stored(self) -> bool:
        """Says whether the stream has the bytes of the file itself, so that it can seek."""
        return not self.compression and not self.encoding


def compression_of(magic: bytes) -> str:
    """Returns the compression of a file that begins with these bytes; empty: no known one."""
    if magic.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    skippable = magic[1:4] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5  # zstandard's skippable frame
    if magic.startswith(b"\x28\xb5\x2f\xfd") or skippable:
        return "zstandard"
    if magic.startswith(b"\xfd7zXZ\0"):
        return "xz"
    if magic.startswith(b"BZh") and magic[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return "bzip2"
    return ""


def open_stream(raw: IO[bytes]) -> Opened:
    """Opens the contents of a binary file, from its beginning, as a stream.

    Reading from the stream raises `Damaged` where the file cannot be decompressed.
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
    """A reader of zstandard frames, one after another, as in the result of `cat a.zst b.zst`.

    The reader of the zstandard library does not notice that a file is cut within a frame.
    """

    PIECE = 1024  # bytes to decompress at once: they may expand by a factor of 30,000

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._decompressor = raw, zstandard.ZstdDecompressor()
        self._frame: Any = None  # the decompressor of a frame that has not ended
        self._stored = self._left = memoryview(b"")

    def read1(self, size: int) -> bytes:
        while not self._left:
            self._stored = self._stored or memoryview(self._raw.read(1 << 16))
            if not self._stored:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
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
    """A stream over a decompressor or decoder; after a failure, every read raises `Damaged`."""

    def __init__(self, source: Any) -> None:
        self._source, self._failure = source, ""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._failure:
            raise Damaged(self._failure)
        try:
            piece = self._source.read1(len(buffer))  # returns all bytes that precede the damage
        except OSError as error:
            if error.errno is not None:  # an error of the disk, not of the decompressor
                raise
            self._failure = str(error) or "damaged"
            raise Damaged(self._failure) from error
        except _BROKEN as error:
            self._failure = str(error) or "damaged"
            raise Damaged(self._failure) from error
        buffer[: len(piece)] = piece
        return len(piece)


class _Decoder:
    """A reader that turns UTF-16 or UTF-32 into UTF-8; invalid input gives invalid UTF-8."""

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
            except UnicodeDecodeError:  # the start of the next character is unknown
                text, self._ended = "", True
                self._left = b"\xff"
            self._left = text.encode("utf-8", "surrogatepass") + self._left
        taken, self._left = self._left[:size], self._left[size:]
        return taken
