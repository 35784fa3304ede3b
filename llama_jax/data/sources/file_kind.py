"""The kind of a file, from its first bytes; from its name if the bytes do not decide.

A file whose lines are JSON objects is read as JSON lines, whatever its name is. A file is read as a
JSON list if it is named `.json`, or begins with a list of objects.
"""

import dataclasses
import json
import re
from typing import Any

from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.sources.decompression import Damaged, Opened, open_stream
from llama_jax.data.sources.nested_fields import field_of
from llama_jax.data.sources.part import longest_json
from llama_jax.errors import UserError
from llama_jax.files import refuse_lfs_pointer, size_of

HEAD = 1 << 16  # bytes at the beginning of a file that decide
LINES = 20  # lines at the beginning of a file that decide
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
ZIPPED = (".gz", ".gzip", ".zst", ".zstd", ".xz", ".bz2")
RECORD_FIELDS = ("conversations", "messages", "instruction", "text")
# Texts that end a document in widely used corpora.
MARKERS = (b"<|endoftext|>", b"<|end_of_text|>")
DAMAGED = "damaged compressed file"
_PARQUET = b"PAR1\x15"  # the magic bytes, and the first byte of the header after them
_BOM = b"\xef\xbb\xbf"
# Files that cannot be read here: an offset, the bytes at that offset, and what the files are.
_FOREIGN = (
    *((0, b"PK\x03\x04", "zip archives"), (0, b"PK\x05\x06", "zip archives")),
    *((0, b"7z\xbc\xaf\x27\x1c", "7z archives"), (0, b"Rar!\x1a\x07", "RAR archives")),
    *((257, b"ustar", "tar archives"), (0, b"\x04\x22\x4d\x18", "files compressed by lz4")),
    *((0, b"%PDF-", "PDF files"), (0, b"ARROW1", "Arrow files"), (0, b"Obj\x01", "Avro files")),
    *((0, b"ORC", "ORC files"), (0, b"SQLite format 3\0", "SQLite databases")),
    *((0, b"\x89PNG", "images"), (0, b"\xff\xd8\xff", "images"), (0, b"GIF8", "images")),
    *((0, b"\x93NUMPY", "NumPy arrays"), (0, b"\x89HDF", "HDF5 files")),
    *((0, b"\x7fELF", "programs"), (0, b"PARE", "encrypted Parquet files")),
)


@dataclasses.dataclass(frozen=True)
class FileKind:
    """The kind of a file.

    Attributes:
      kind: the `kind` of its `Part`: `files`, `jsonl`, `json` or `parquet`; `damaged`: its name
        says that it is compressed, but it is not; empty: it cannot be read here.
      label: the kind in words, for the report.
      as_stored: whether reading can begin in the middle, since the bytes are those on disk.
      size: bytes on disk.
    """

    kind: str
    label: str
    as_stored: bool
    size: int


def identify_file(path: epath.Path, config: DataConfig) -> FileKind:
    """Determines the kind of a file.

    Raises:
      UserError: the file cannot be read, is a pointer of Git LFS, or is named `.json` but does not
        hold records.
    """
    try:
        size = size_of(path)
        with path.open("rb") as raw:
            opened = open_stream(raw)
            head, ended = _read_head(opened)
            refuse_lfs_pointer(head, str(path))
            if foreign := _foreign(head, opened, format_by_name(path)[0]):
                return FileKind("", foreign, False, size)
            kind, label = _Decision(path, config, opened, head, ended).decide()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if opened.encoding:
        label += f" in {opened.encoding}"
    return FileKind(kind, label, opened.as_stored, size)


def format_by_name(path: epath.Path) -> tuple[str, bool]:
    """Returns the format by the name of a file, or '', and whether it is named as compressed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] != [] and suffixes[-1] in ZIPPED
    last = suffixes[-2:-1] if zipped else suffixes[-1:]
    return (FORMATS.get(last[0], "") if last else ""), zipped


def _read_head(opened: Opened) -> tuple[bytes, bool]:
    """Reads up to `HEAD` bytes of a stream; also returns whether the stream ends there."""
    read = getattr(opened.file, "read1", opened.file.read)
    head = b""
    try:
        while len(head) < HEAD:
            piece = read(HEAD - len(head))
            if not piece:
                return head, True
            head += piece
    except Damaged:
        pass
    return head, False


def _foreign(head: bytes, opened: Opened, name: str) -> str:
    """Returns a name for files like this if they cannot be read here; empty: they may be readable.

    Args:
      head: the first bytes.
      opened: the open file.
      name: the format by the name of the file.
    """
    if opened.as_stored and (head.startswith(_PARQUET) or name == "parquet"):
        return ""
    for offset, magic, name in _FOREIGN:
        if head.startswith(magic, offset):
            return name
    if not opened.as_stored and head.startswith(_PARQUET):
        return f"Parquet files inside {opened.compression}"
    line = head.removeprefix(_BOM).lstrip().split(b"\n", 1)[0]
    if 0 not in line and isinstance(_parse(line), dict):
        return ""  # JSON lines; a crash of the writer's machine may have padded them with NULs
    # A text may contain a NUL. UTF-16 has one for each ASCII character, and binary files have many.
    if head.count(0) > 1 + len(head) // 20:
        even, odd = head[::2].count(0), head[1::2].count(0)
        if len(head) % 2 == 0 and min(even, odd) * 10 < max(even, odd) > len(head) // 5:
            return "files that look like UTF-16 without a byte order mark"
        return "binary files"
    return ""


def _parse(line: bytes | str) -> Any:
    """Returns the value of a line of JSON; None if the line is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _most(objects: list[bool]) -> bool:
    """Returns whether most lines are objects: a few lines may be damaged."""
    return 2 * sum(objects) > len(objects)


class _Decision:
    """The decision of what kind one file is. Keeps its first bytes, and reads more if needed."""

    def __init__(
        self, path: epath.Path, config: DataConfig, opened: Opened, head: bytes, ended: bool
    ) -> None:
        self.path, self.config, self.opened = path, config, opened
        self.named, self.zipped = format_by_name(path)
        self.text = head.removeprefix(_BOM).lstrip()
        self.ended = ended

    def decide(self) -> tuple[str, str]:
        """Returns kind and label, as in `FileKind`.

        Raises:
          UserError: the file is named `.json` but does not hold records.
        """
        if self.text.startswith(_PARQUET) or (self.named == "parquet" and not self.zipped):
            return "parquet", "Parquet"
        decision = {b"{": self._object, b"[": self._list}.get(self.text[:1], self._neither)()
        if decision:
            return decision
        if self.zipped and not self.opened.compression:
            return "damaged", DAMAGED
        if self.named == "jsonl":
            return "jsonl", "JSON lines"
        if self.named == "json" and (self.config.template or not (self.text or self.ended)):
            return "json", "JSON lists"  # reading the file reports what is wrong
        if self.named == "json" and self.text:
            raise UserError(
                f"{self.path} is neither JSON lines nor a JSON list or object; if it is plain "
                "text, rename it to .txt, otherwise name only the other files in data.source"
            )
        marker = next((mark.decode() for mark in MARKERS if mark in self.text), "")
        if marker and not self.config.separator:
            return "files", f"plain text with {marker} in it, where data.separator can cut it"
        return "files", "plain text"

    def _lines(self) -> list[bytes]:
        """Returns the first complete lines that are not empty."""
        lines = self.text.split(b"\n")
        if not self.ended:
            lines = lines[:-1]
        return [line for line in lines if line.strip()][:LINES]

    def _objects(self) -> list[bool]:
        """Returns for each of these lines whether it is a JSON object."""
        return [isinstance(_parse(line), dict) for line in self._lines()]

    def _grow(self) -> bool:
        """Doubles the text read so far, up to the length that one document may have in JSON.

        Returns:
          Whether there may be more to read.
        """
        limit = longest_json(self.config)
        if self.ended or len(self.text) >= limit:
            return False
        try:
            piece = self.opened.file.read(min(max(HEAD, len(self.text)), limit - len(self.text)))
        except Damaged:
            return False
        self.ended = not piece
        self.text += piece
        return not self.ended

    def _grow_whole(self) -> None:
        while self._grow():
            pass

    def _object(self) -> tuple[str, str] | None:
        objects = self._objects()
        if not objects and self.named == "jsonl":
            return "jsonl", "JSON lines"
        if not objects:  # the first line is long; the next one shows what the file is
            while (len(objects) < 2 or not _most(objects)) and self._grow():
                objects = self._objects()
            objects = self._objects()
        single = self.ended and len(objects) == 1
        if _most(objects) and not (single and self.named == "json"):
            return "jsonl", "JSON lines"
        if not self.named:
            return None
        if objects[:1] == [True] and not single:
            return "jsonl", "JSON lines"
        value, alone = self._first_value()
        if value is None and (any(objects) or self.named == "jsonl"):
            return "jsonl", "JSON lines"
        if value is None and not self.ended and len(self.text) > HEAD:
            raise UserError(
                f"{self.path} begins with an object of more than {len(self.text):,} bytes, which "
                "cannot be one document; write the documents as JSON lines or as a list, or name "
                "only the other files in data.source"
            )
        if alone and self.named == "json":
            self._check_object(value)
        return "json", "JSON objects"

    def _first_value(self) -> tuple[Any, bool]:
        """Returns the first value of the file, or None, and whether the file holds nothing else."""
        if self.named == "json" or not self.ended:
            self._grow_whole()
        text = self.text.decode("utf-8", "replace")
        try:
            value, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return None, False
        return value, self.ended and not text[end:].strip()

    def _check_object(self, value: Any) -> None:
        """Checks that the only object of a file is a record.

        Raises:
          UserError: the object has no text in `data.text_field`.
        """
        field = self.config.text_field
        if self.config.template or isinstance(field_of(value, field), str):
            return
        raise UserError(
            f"{self.path} is one JSON object without a text in field {field!r} "
            f"({describe_fields(value)}); "
            "set data.text_field to the field that holds the text, write the documents as JSON "
            "lines or as a list, or name only the other files in data.source"
        )

    def _list(self) -> tuple[str, str] | None:
        lines = self._lines()
        if self.named == "jsonl" and len(lines) > 1 and isinstance(_parse(lines[0]), list):
            return "jsonl", "JSON lines"
        if self.named:
            return "json", "JSON lists"
        begin = re.match(rb"\[\s*\{", self.text)
        if begin is None:
            return None
        for _ in range(2):
            text = self.text[begin.end() - 1 :].decode("utf-8", "replace")
            try:
                value, end = json.JSONDecoder().raw_decode(text)
            except (ValueError, RecursionError):
                self._grow_whole()  # the first item is long
                continue
            if value and text[end:].lstrip()[:1] in (",", "]"):
                return "json", "JSON lists"
            break
        return None

    def _neither(self) -> tuple[str, str] | None:
        """Recognises JSON lines whose first line is damaged."""
        objects = [
            line.lstrip().startswith(b"{") and isinstance(_parse(line), dict)
            for line in self._lines()
        ]
        if _most(objects) or (self.named and any(objects)):
            return "jsonl", "JSON lines"
        return None


def describe_fields(record: Any) -> str:
    """Describes the fields of a record in a few words."""
    if not isinstance(record, dict):
        return f"it is {type(record).__name__}, not an object"
    names = [repr(str(name)[:40]) for name in list(record)[:6]]
    more = ", .." if len(record) > 6 else ""
    return f"it has {', '.join(names)}{more}" if names else "it has no field"
