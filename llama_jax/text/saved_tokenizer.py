"""The tokenizer of a saved step, read and verified without the rest of the step.

The folder of a step (see `checkpoint`) holds the tokenizer's file in base64 in `tokenizer/metadata`
(JSON), and in `manifest.json` size and sha256 of every file.
"""

import base64

from etils import epath

from llama_jax.errors import UserError, as_user_error
from llama_jax.files import entry_of, mismatch, read_entries, read_json

_MANIFEST = "manifest.json"
_ITEM = "tokenizer"
_DESCRIPTION = ("meta", _ITEM)  # all that a step says about itself is verified


def holds_tokenizer(path: epath.Path) -> bool:
    """Whether this is the folder of a saved step."""
    return (path / _ITEM).exists()


def read_saved(step_folder: epath.Path) -> bytes:
    """The tokenizer's file that a saved step holds; empty if the run had none.

    Raises:
      UserError: what the step says about itself is not what was written.
    """
    folder = step_folder.absolute()
    if reason := _damage(folder):
        raise UserError(f"{folder} is damaged: {reason}")
    values = read_json(folder / _ITEM / "metadata")
    with as_user_error(f"{folder}/{_ITEM}"):
        return base64.b64decode(values["sentencepiece"])


def _damage(folder: epath.Path) -> str:
    """The first file of the description that is not as it was written; empty if all are."""
    if not (folder / _MANIFEST).exists():
        return f"{_MANIFEST} is missing"
    entries = read_entries(folder / _MANIFEST)
    if entries is None:
        return f"{_MANIFEST} is not as it was written"
    for item in _DESCRIPTION:
        listed = [name for name in entries if name.partition("/")[0] == item]
        if not listed:
            return f"{item} is missing"
        for name in listed:
            if not (folder / name).exists():
                return f"{name} is missing"
            try:
                found = entry_of((folder / name).read_bytes())
            except OSError as error:
                return f"{name} cannot be read: {error.strerror or error}"
            if reason := mismatch(name, found, entries[name]):
                return reason
    return ""
