"""Finds the files of a Hugging Face folder that hold its weights.

transformers reads the first of these that exists: `model.safetensors`, the shards of
`model.safetensors.index.json`, `pytorch_model.bin`, the shards of `pytorch_model.bin.index.json`.
It ignores other files, such as Mistral's own `consolidated.safetensors`. A folder from which
transformers and another reader could take different weights raises an error.
"""

from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from llama_jax.errors import UserError
from llama_jax.files import read_json
from llama_jax.interchange import pickles, safetensors
from llama_jax.interchange.safetensors import shown

_INDEX = ".index.json"


Stored = safetensors.Entry | pickles.Entry  # a tensor; its numbers are read on demand
_Reader = Callable[[epath.Path], Mapping[str, Stored]]
_READERS: Mapping[str, _Reader] = {
    "model.safetensors": safetensors.read_header,
    "pytorch_model.bin": pickles.read_tensors,
}


def abbreviate_names(names: list[str]) -> str:
    """Returns the first of several names, and the number of the others."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return shown(names[0]) + more


def open_weights(folder: epath.Path, named: Any = None) -> dict[str, Stored]:
    """Opens every tensor of a folder, by name; does not read their numbers.

    Args:
      folder: folder in Hugging Face's format.
      named: file to read, from `transformers_weights` in config.json; None: the first of the usual
        names that exists.

    Raises:
      UserError: a file is missing or damaged, or it is not clear which of several files holds the
        weights.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} has config.json and adapter_config.json: transformers adds the adapters to "
            "the weights; move one of the two away (peft:DIR reads adapters)"
        )
    if named is not None:
        return _named(folder, named)
    for name, read in _READERS.items():
        single, index = folder / name, folder / (name + _INDEX)
        if index.exists():
            weight_map = _weight_map(index)
            if single.exists() and set(weight_map.values()) != {name}:
                raise UserError(
                    f"{folder} has {single.name} and {index.name}: transformers reads the first, "
                    "other programs read the files of the second; move one of the two away"
                )
            return _sharded(index, weight_map, read)
        if single.exists():
            return dict(read(single))
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        several = "several safetensors files" if len(others) > 1 else others[0]
        raise UserError(f"{folder} has {several}, but no model.safetensors{_INDEX}")
    raise UserError(f"{folder} has no model.safetensors, and no pytorch_model.bin")


def _named(folder: epath.Path, named: Any) -> dict[str, Stored]:
    """Opens the weights that config.json names; transformers accepts no pickles there."""
    origin = "config.json (transformers_weights)"
    if not isinstance(named, str) or not named.endswith((".safetensors", f".safetensors{_INDEX}")):
        raise UserError(f"{folder}: {origin} names {named!r:.200}, which is not a safetensors file")
    _check_names(folder, [named], origin)
    if named.endswith(_INDEX):
        weight_map = _weight_map(folder / named)
        return _sharded(folder / named, weight_map, safetensors.read_header)
    return dict(safetensors.read_header(folder / named))


def _check_names(folder: epath.Path, names: list[str], origin: str) -> None:
    """Checks that names are those of existing files in a folder."""
    outside = [name for name in names if name in ("", ".", "..") or "/" in name or "\\" in name]
    if outside:
        raise UserError(
            f"{folder}: {origin} names files outside its folder: {abbreviate_names(outside)}"
        )
    missing = [name for name in names if "\0" in name or not (folder / name).exists()]
    if missing:
        raise UserError(f"{folder} lacks {abbreviate_names(missing)}, which {origin} names")


def _weight_map(index: epath.Path) -> dict[str, str]:
    """Reads tensor -> file from an index."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index} is damaged: it has no weight_map")
    _check_names(index.parent, sorted(set(found.values())), index.name)
    return found


def _sharded(index: epath.Path, weight_map: dict[str, str], read: _Reader) -> dict[str, Stored]:
    """Returns the tensors of all files that an index names.

    A tensor may be in two of the files. transformers takes the last file, other programs the file
    that the index names for the tensor.

    Raises:
      UserError: a tensor is missing, or has other numbers in another file.
    """
    found: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        for name, entry in read(index.parent / file).items():
            first = found.get(name)
            if first and weight_map.get(name) != file and not same_numbers(first, entry):
                raise UserError(
                    f"{index.parent}: {shown(name)} is in {first.file.name} and in {file} with "
                    "other numbers, and programs differ in which file they read"
                )
            found[name] = entry
    absent = [name for name in weight_map if name not in found]
    if absent:
        raise UserError(
            f"{index.parent} lacks {abbreviate_names(absent)}, which {index.name} names"
        )
    return found


def same_numbers(left: Stored, right: Stored) -> bool:
    """Returns whether two tensors are equal, bit for bit; holds a few rows in memory at a time."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    for start in range(0, left.shape[0] if left.shape else 1, 4096):
        rows = slice(start, start + 4096)
        if left.rows(rows).tobytes() != right.rows(rows).tobytes():
            return False
    return True
