"""Merges the reports of all parts of a source into its manifest."""

import itertools
import json
from typing import Any

from etils import epath

from llama_jax.data.prepare.tokenize import report_name
from llama_jax.data.shards import layout
from llama_jax.data.sources.part import Part, Tally
from llama_jax.text.tokenizer import Tokenizer


def merge_reports(
    settings: dict[str, Any], parts: list[Part], folder: epath.Path, listing: Tally
) -> dict[str, Any]:
    """Returns the manifest of a source whose parts are all done.

    Args:
      settings: the settings that the shards depend on.
      parts: the parts of the source.
      folder: the folder of their reports and shards.
      listing: the files that were listed and left out in the source.
    """
    reports = [json.loads((folder / report_name(i)).read_text()) for i in range(len(parts))]
    noted: dict[str, dict[str, list[Any]]] = {"skipped": {}, "changed": {}}
    for report, (kind, counts) in itertools.product(reports, noted.items()):
        for reason, (count, first) in report.get(kind, {}).items():
            counts.setdefault(reason, [0, first])[0] += count
    splits: dict[str, dict[str, Any]] = {}
    for split in layout.SPLITS:
        found = [report["splits"][split] for report in reports]
        names = ["documents", "tokens", "answer_tokens", "text_bytes"]
        if "template" in settings:
            names += ["answers", "unended_answers"]
        splits[split] = {name: sum(one.get(name, 0) for one in found) for name in names}
        splits[split]["shards"] = [shard for one in found for shard in one["shards"]]
    tokenizer = Tokenizer.load(folder / layout.TOKENIZER)
    return {
        "format_version": layout.FORMAT_VERSION,
        "settings": settings,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.fingerprint,
        **({"template_sha256": settings["template"]} if "template" in settings else {}),
        "files": dict(listing.files),
        "left_out": listing.noted("left_out"),
        **noted,
        "splits": splits,
    }
