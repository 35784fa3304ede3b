"""Reads and verifies the tokenizer of a saved step, without the rest of the step.

The folder of a step (see `checkpoint.saved_step`) holds the file of the tokenizer, in base64, in
`tokenizer/metadata` (JSON), and the size and sha256 of every file in `manifest.json`.
"""

import base64
from collections.abc import Mapping
from typing import Any

from etils import epath

from llama_jax.errors import UserError, as_user_error
from llama_jax.files import damages, read_json

FORMAT_VERSION = 2  # the format of saved steps; raise it when readers must change
MANIFEST = "manifest.json"
_ITEM = "tokenizer"
DESCRIPTION = ("meta", _ITEM)  # folders with the description of a step, in JSON


def holds_tokenizer(path: epath.Path) -> bool:
    """Returns whether a folder is a saved step."""
    return (path / _ITEM).exists()


def read_saved(step_folder: epath.Path) -> bytes:
    """Reads the file of the tokenizer from a saved step; it is empty if the run had no tokenizer.

    Raises:
      UserError: the description of the step is damaged, or has another format.
    """
    folder = step_folder.absolute()
    if reason := next(damages(folder / MANIFEST, DESCRIPTION), ""):
        raise UserError(f"{folder} is damaged: {reason}")
    check_format(folder, read_json(folder / "meta" / "metadata"))
    values = read_json(folder / _ITEM / "metadata")
    with as_user_error(f"{folder}/{_ITEM}"):
        return base64.b64decode(values["sentencepiece"])


def check_format(folder: epath.Path, meta: Mapping[str, Any]) -> None:
    """Checks that the `meta` of a step has the format that this version reads.

    Raises:
      UserError: it has another format, or does not name its format.
    """
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format {version!r}, this version reads {FORMAT_VERSION}")
