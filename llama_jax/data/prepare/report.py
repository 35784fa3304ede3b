"""The report of `prepare` on what it read and wrote, and its progress display."""

import dataclasses
import sys
import time
from typing import Any

from etils import epath

from llama_jax.data.shards.layout import MANIFEST, SPLITS
from llama_jax.errors import as_user_error
from llama_jax.text import answer_ends


@dataclasses.dataclass(frozen=True)
class Report:
    """The report on one prepared source.

    Attributes:
      folder: the folder of its shards.
      splits: for each split, the numbers of documents, tokens, text_bytes and sequences (0 if
        documents are not packed); for instruction data also of answer_tokens (the tokens that count
        in the loss), answers and unended_answers (without an end token).
      skipped: documents that could not be used: reason -> [count, place of the first].
      changed: documents that were changed before use, in the same form.
      pack_len: sequence length in tokens that documents were packed for; 0: not packed.
      files: number of files of each kind that were read; empty for shards of an earlier version.
      left_out: files and folders that were not read, in the form of `skipped`.
      held_out: number of tokens that were held out at the end of the source, and why; None: whole
        documents were held out, chosen by their hashes.
    """

    folder: epath.Path
    splits: dict[str, dict[str, int]]
    skipped: dict[str, list[Any]]
    changed: dict[str, list[Any]]
    pack_len: int
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    held_out: tuple[int, str] | None = None

    def __str__(self) -> str:
        answers = any("answer_tokens" in split for split in self.splits.values())
        what = "conversations" if answers else "documents"
        lines = [f"{'split':<12}{what:>14}{'tokens':>16}{'bytes/token':>13}"]
        if answers:
            lines[0] += f"{'of answers':>16}"
        if self.pack_len:
            lines[0] += f"{'sequences':>13}{'padding':>9}"
        for name, split in self.splits.items():
            ratio = split["text_bytes"] / split["tokens"] if split["tokens"] else 0.0
            line = f"{name:<12}{split['documents']:>14,}{split['tokens']:>16,}{ratio:>13.2f}"
            if answers:
                line += f"{split['answer_tokens']:>16,}"
            if self.pack_len:
                slots = split["sequences"] * self.pack_len
                # A document of n tokens has n - 1 inputs.
                used = split["tokens"] - split["documents"]
                share = 1 - used / slots if slots else 0.0
                line += f"{split['sequences']:>13,}{share:>9.2%}"
            lines.append(line)
        if any("answers" in split for split in self.splits.values()):
            lines.append(answer_ends.describe_unended(*answer_ends.count_in_splits(self.splits)))
        for kind_of_file, count in sorted(self.files.items()):
            lines.append(f"{'files':<12}{count:>14,}  {kind_of_file}")
        if self.held_out:
            lines.append(f"{'held out':<12}{self.held_out[0]:>14,}  {self.held_out[1]}")
        noted = {"left out": self.left_out, "skipped": self.skipped, "changed": self.changed}
        for kind, reasons in noted.items():
            for reason, (count, first) in sorted(reasons.items()):
                lines.append(f"{kind:<12}{count:>14,}  {reason}; the first: {first}")
        return "\n".join([*lines, f"token shards in {self.folder}"])


def report_of(folder: epath.Path, manifest: dict[str, Any]) -> Report:
    """Reads the report from a manifest.

    Raises:
      UserError: the manifest lacks an entry of the report.
    """
    with as_user_error(f"{folder}/{MANIFEST}"):
        return _report_of(folder, manifest)


def _report_of(folder: epath.Path, manifest: dict[str, Any]) -> Report:
    splits = {}
    for name in SPLITS:
        split = manifest["splits"][name]
        splits[name] = {key: split[key] for key in ("documents", "tokens", "text_bytes")}
        splits[name]["sequences"] = sum(shard.get("sequences", 0) for shard in split["shards"])
        if "template_sha256" in manifest:
            kinds = ("answer_tokens", "answers", "unended_answers")  # older shards lack some
            splits[name] |= {kind: split[kind] for kind in kinds if kind in split}
    pack_len = manifest["settings"].get("pack_len", 0)
    held_out = manifest.get("held_out")
    return Report(
        folder,
        splits,
        manifest["skipped"],
        manifest.get("changed", {}),
        pack_len,
        manifest.get("files", {}),
        manifest.get("left_out", {}),
        (held_out["tokens"], held_out["why"]) if held_out else None,
    )


class Progress:
    """A progress display on stderr: a line that is rewritten twice a second on a terminal.

    In a log file, it writes one line a minute.
    """

    def __init__(self, total: int) -> None:
        self._began = self._shown = time.monotonic()
        self._total, self._bytes, self._tokens = total, 0, 0
        self._terminal = sys.stderr.isatty()

    def add(self, n_bytes: int, n_tokens: int) -> None:
        """Adds bytes of the source and tokens that are done, and shows the progress."""
        self.set(self._bytes + n_bytes, self._tokens + n_tokens)

    def set(self, n_bytes: int, n_tokens: int) -> None:
        """Sets how many bytes of the source and tokens are done, and shows the progress."""
        self._bytes, self._tokens = n_bytes, n_tokens
        now = time.monotonic()
        if now - self._shown < (0.5 if self._terminal else 60):
            return
        self._shown = now
        seconds = now - self._began
        left = (self._total - n_bytes) * seconds / max(n_bytes, 1)
        text = (
            f"{n_bytes / max(self._total, 1):6.1%}  {n_bytes / 1e6:,.0f} of "
            f"{self._total / 1e6:,.0f} MB  {n_bytes / 1e6 / seconds:.1f} MB/s  "
            f"{n_tokens / seconds:,.0f} tokens/s  ETA {left / 60:,.0f}m{left % 60:02.0f}s"
        )
        end = "" if self._terminal else "\n"
        start = "\r" if self._terminal else ""
        print(f"{start}{text:<90}", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clears the line on the terminal."""
        if self._terminal:
            print("\r" + " " * 90 + "\r", end="", file=sys.stderr, flush=True)
