"""The tokenizer of a saved step, read and verified without the rest of the step.

The folder of a step (see `checkpoint.saved_step`) holds the tokenizer's file in base64 in
`tokenizer/metadata` (JSON), and in `manifest.json` size and sha256 of every file.
"""

import base64
from collections.abc import Mapping
from typing import Any

from etils import epath

from llama_jax.errors import UserError, as_user_error
from llama_jax.files import damages, read_json

FORMAT_VERSION = 2  # of saved steps; bump when one can no longer be read as before
MANIFEST = "manifest.json"
_ITEM = "tokenizer"
DESCRIPTION = ("meta", _ITEM)  # folders of what a step says about itself, in JSON


def holds_tokenizer(path: epath.Path) -> bool:
    """Whether this is the folder of a saved step."""
    return (path / _ITEM).exists()


def read_saved(step_folder: epath.Path) -> bytes:
    """The tokenizer's file that a saved step holds; empty if the run had none.

    Raises:
      UserError: what the step says about itself is not what was written, or of another format.
    """
    folder = step_folder.absolute()
    if reason := next(damages(folder / MANIFEST, DESCRIPTION), ""):
        raise UserError(f"{folder} is damaged: {reason}")
    check_format(folder, read_json(folder / "meta" / "metadata"))
    values = read_json(folder / _ITEM / "metadata")
    with as_user_error(f"{folder}/{_ITEM}"):
        return base64.b64decode(values["sentencepiece"])


def check_format(folder: epath.Path, meta: Mapping[str, Any]) -> None:
    """Checks that a step's `meta` says the format that is read here.

    Raises:
      UserError: it says another, or none.
    """
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format {version}, this version reads {FORMAT_VERSION}")
