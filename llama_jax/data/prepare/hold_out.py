"""A validation split of the last tokens, for a source that random choice does not split.

A hash of its contents decides whether a document is held out for validation; about
`data.validation_fraction` of the documents are. In a source of a few large documents, this may
choose none or all of them, which would leave no validation data or no training data. Then the last
tokens of the source are held out: the last parts are written again, and one of them is cut in two.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from llama_jax.config import DataConfig
from llama_jax.data.prepare.tokenize import report_name, write_part
from llama_jax.data.shards.layout import SPLITS
from llama_jax.data.shards.packing import INDEX_DTYPE
from llama_jax.data.sources.part import Part
from llama_jax.errors import as_user_error
from llama_jax.files import read_json

LEAST = 2  # the fewest tokens of a split: an input and its target

Note = dict[str, Any]  # `tokens`: the number held out at the end; `why`: the reason


def hold_out_tail(
    data: DataConfig,
    pack_len: int,
    parts: list[Part],
    folder: epath.Path,
    log: Callable[[str], None],
) -> Note | None:
    """Holds out the tail of a source whose parts are all done, if the hashes have not split it.

    The process may be killed at any point. Call this again when all parts are done again: the
    result depends only on their reports.

    Args:
      data: how to read. `validation_fraction` of all tokens are held out, but at most half of the
        part that is cut. Plain text is cut at any token, conversations stay whole.
      pack_len: sequence length in tokens to pack documents for; 0: do not pack.
      parts: the parts of the source.
      folder: the folder of their shards.
      log: receives a line for the user.

    Returns:
      The note for the manifest; None: the hashes have split the source, or it is empty.

    Raises:
      UserError: a report of a part cannot be read, or a file of the source cannot be opened.
    """
    with as_user_error(f"a report of a finished part in {folder} (--restart begins again)"):
        reports = [read_json(folder / report_name(index)) for index in range(len(parts))]
        totals = [_count(report, "tokens", *SPLITS) for report in reports]
        trained, held_out = (
            sum(_count(report, "documents", split) for report in reports) for split in SPLITS
        )
        borders = [int(r.get("train_tokens", t)) for r, t in zip(reports, totals, strict=True)]
    fraction = f"data.validation_fraction={data.validation_fraction:g}"
    why = f"{fraction} chose none or all of its documents"
    if any(0 < border < total for border, total in zip(borders, totals, strict=True)):
        return _note(sum(totals) - sum(borders), why)  # an earlier call has finished this
    begun = any("train_tokens" in report for report in reports)
    if (trained and held_out and not begun) or not trained + held_out:
        return None
    if not data.validation_fraction:
        return {"tokens": 0, "why": "tokens: data.validation_fraction is 0"}
    wanted = max(LEAST, round(data.validation_fraction * sum(totals)))
    cut, borders = _plan(folder, reports, totals, wanted, bool(data.template))
    if borders != totals:
        log(f"{why}: the last tokens are held out instead")
    todo = [
        index
        for index, report in enumerate(reports)
        if report.get("train_tokens") != borders[index]
        and (_count(report, "documents", "validation") or borders[index] < totals[index])
    ]
    # The part that is cut comes last: its report shows that all is done.
    for index in sorted(todo, key=lambda index: index == cut):
        # Without its report the part is not done, while its shards are replaced one by one.
        (folder / report_name(index)).unlink()
        write_part(
            *(data, pack_len, str(folder), index, parts[index]),
            threads=data.workers or os.cpu_count() or 1,
            train_tokens=borders[index],
        )
    if borders != totals:
        return _note(sum(totals) - sum(borders), why)
    few = "one conversation" if data.template else "a few tokens"
    return {"tokens": 0, "why": f"tokens: {why}, and it has only {few} to train on"}


def _plan(
    folder: epath.Path,
    reports: list[dict[str, Any]],
    totals: list[int],
    wanted: int,
    whole: bool,
) -> tuple[int, list[int]]:
    """Plans which part to cut, and how many tokens of each part to train on.

    Small parts at the end are held out whole, and the part before them is cut. The plan is the same
    whether or not some of the small parts are already written again.

    Args:
      folder: the folder of the shards.
      reports: the reports of the parts.
      totals: number of tokens of each part.
      wanted: number of tokens to hold out.
      whole: documents must not be cut.

    Returns:
      The index of the part to cut (-1: no part is cut), and the number of tokens of each part to
      train on.
    """
    borders = list(totals)
    for index in reversed(range(len(totals))):
        if 0 < totals[index] <= wanted and any(totals[:index]):
            borders[index] = 0
            wanted -= totals[index]
            if wanted < LEAST:
                break
            continue
        others = any(border for i, border in enumerate(borders) if i != index)
        border = _border(_starts(folder, reports[index]), wanted, whole, others)
        if border is not None:
            borders[index] = border
            return index, borders
    return -1, borders


def _note(tokens: int, why: str) -> Note:
    return {"tokens": tokens, "why": f"tokens at the end of the source: {why}"}


def why_no_validation(manifest: dict[str, Any]) -> str:
    """Returns the reason why the validation split of a manifest is empty."""
    if "held_out" in manifest:
        return str(manifest["held_out"]["why"]).removeprefix("tokens: ")
    fraction = manifest["settings"].get("validation_fraction", 0)
    return f"none of its documents was chosen by data.validation_fraction={fraction}"


def _count(report: dict[str, Any], what: str, *splits: str) -> int:
    return sum(report["splits"][split][what] for split in splits)


def _starts(folder: epath.Path, report: dict[str, Any]) -> np.ndarray:
    """Returns where the documents of a part begin, in tokens, followed by the end of the last one.

    All documents of the part must be in one split.
    """
    starts, before = [], 0
    for shard in (shard for split in SPLITS for shard in report["splits"][split]["shards"]):
        index = np.frombuffer((folder / f"{shard['name']}.idx").read_bytes(), INDEX_DTYPE)
        starts.append(index + before)
        before += shard["tokens"]
    return np.concatenate([*starts, [before]]).astype(np.int64)


def _border(starts: np.ndarray, wanted: int, whole: bool, others: bool) -> int | None:
    """Returns how many tokens of a part remain for training when its tail is held out.

    Args:
      starts: where its documents begin, in tokens, followed by the end of the last one.
      wanted: number of tokens to hold out; at most half of the part is.
      whole: documents must not be cut.
      others: whether other parts have documents to train on.

    Returns:
      The number of tokens; None: the part cannot be cut.
    """
    end = int(starts[-1])
    border = end - min(wanted, end // 2)
    if whole:
        if len(starts) < (2 if others else 3):
            return None
        return int(starts[min(int(starts.searchsorted(border)), len(starts) - 2)])
    if end < 2 * LEAST:
        return None
    # A piece of one token has no target, so the cut moves to the border of a document.
    after = int(starts.searchsorted(border, side="right"))
    if border - int(starts[after - 1]) < LEAST:
        border = int(starts[after - 1])
    elif int(starts[after]) - border < LEAST:
        border = int(starts[after])
    return border
