"""What `prepare` tells: how far it is, and at the end what it found."""

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
    """What preparing found in one source.

    Attributes:
      folder: where its shards are.
      splits: per split: documents, tokens, text_bytes, sequences where documents are packed, and
        answer_tokens where only these count, with the numbers of answers and of unended_answers.
      skipped: documents that could not be used: reason -> (how many, where the first was).
      changed: documents that are not used as they are, in the same way.
      pack_len: sequence length that documents were packed for; 0 if they were not.
      files: how many files of each kind were read; empty for shards of an earlier version.
      left_out: files and folders that were not read, as `skipped`.
      held_out: where no document was held out: how many tokens at the end were, and why.
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
    """The report that a manifest holds.

    Raises:
      UserError: it holds none.
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
            kinds = ("answer_tokens", "answers", "unended_answers")  # before: not all
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
    """One line on a terminal, rewritten twice a second; in a log file, a line a minute."""

    def __init__(self, total: int) -> None:
        self._began = self._shown = time.monotonic()
        self._total, self._bytes, self._tokens = total, 0, 0
        self._terminal = sys.stderr.isatty()

    def add(self, n_bytes: int, n_tokens: int) -> None:
        """Counts what is done."""
        self.set(self._bytes + n_bytes, self._tokens + n_tokens)

    def set(self, n_bytes: int, n_tokens: int) -> None:
        """Shows how much is done."""
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
        """Clears the line."""
        if self._terminal:
            print("\r" + " " * 90 + "\r", end="", file=sys.stderr, flush=True)
