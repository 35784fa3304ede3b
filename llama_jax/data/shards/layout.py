"""A folder of token shards: its format, its manifest, and the checks before it is read.

A folder of shards holds
  manifest.json          the list of the shards, with the checksum of every file and its own
  tokenizer.model        the tokenizer that made the shards
  train-00000-000.bin    token ids, little-endian uint16 or uint32: BOS document EOS, repeated
  train-00000-000.idx    the start of each document, in tokens, little-endian int64
  train-00000-000.pack   with data.packing=best_fit: the pieces of each sequence (`pack_documents`)
  train-00000-000.mask   with data.template: one bit for each token (highest bit of a byte first), 1
                         if it is a target that counts in the loss
  train-00000-000.crc.json  CRC-32 of each block of 64 KiB of .bin and of .mask, in hexadecimal:
                         {"block_bytes": 65536, "bin": "..", "mask": ".."}
  chat_template.json     with data.template: the template, in the form of tokenizer_config.json
  plan.json              in place of the manifest, while the shards are made: the settings of the
                         work (`output_folder`)
and the same files for `validation`. The first number is the part of the source, the second counts
the shards of that part. Each document lies in one shard.

At the start, `check_files` hashes .pack, .crc.json, the tokenizer and the template as a whole, and
the ends of the other files. `reader` checks a block of .bin or .mask when it first reads it, and
.idx whenever it reads it. Earlier versions wrote no .crc.json: only `verify` checks the middle of
.bin and .mask of such shards.
"""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from llama_jax.data.shards.packing import INDEX_DTYPE
from llama_jax.errors import UserError, as_user_error, check_type, require
from llama_jax.files import (
    is_object_store,
    open_file,
    parse_json,
    read_bytes,
    sha256_of,
    sha256_of_each,
)

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PLAN = "plan.json"
TOKENIZER = "tokenizer.model"
TEMPLATE = "chat_template.json"
SPLITS = ("train", "validation")
CRC = "crc.json"
# Opening reads this many bytes at the beginning and at the end of large files: enough to tell one
# shard from another, and fast for 10,000 of them. The bytes between are checked when they are read.
END_BYTES = 4096
_THREADS = 16
# Key of a shard in the manifest -> the kind of file that has this sha256.
_SUMS = {
    "sha256": "bin",
    "index_sha256": "idx",
    "pack_sha256": "pack",
    "mask_sha256": "mask",
    "crc_sha256": CRC,
}


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest type on disk that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def encode_manifest(manifest: dict[str, Any]) -> bytes:
    """Returns the manifest as a file, whose first key is the sha256 of the file itself.

    The sha256 is computed with an empty string as its own value.
    """
    text = json.dumps({"sha256": "", **manifest} | {"sha256": ""}, indent=1) + "\n"
    return text.replace('""', f'"{hashlib.sha256(text.encode()).hexdigest()}"', 1).encode()


def _is_whole(data: bytes, manifest: dict[str, Any]) -> bool:
    digest = str(manifest.get("sha256", ""))
    return hashlib.sha256(data.replace(digest.encode(), b"", 1)).hexdigest() == digest


def no_shards(folder: epath.PathLike) -> UserError:
    """Returns the error for a folder without a manifest."""
    if (epath.Path(folder) / PLAN).exists():
        return UserError(
            f"the token shards in {folder} are unfinished: run the same prepare command again "
            "(or the same train command, if that began them)"
        )
    return UserError(f"no token shards in {folder}; make them with llama_jax.prepare")


def read_manifest(folder: epath.PathLike) -> dict[str, Any]:
    """Reads the manifest of a folder of shards, and checks its form.

    Raises:
      UserError: the folder has no manifest, or the manifest is damaged, has another version, or
        names files outside the folder.
    """
    path = epath.Path(folder) / MANIFEST
    if not path.exists():
        raise no_shards(folder)
    data = read_bytes(path)
    try:
        manifest = parse_json(data, f"cannot read {path}: it")
    except UserError as error:
        raise UserError(f"{error}; restore it or prepare the data again") from error
    version = manifest.get("format_version")
    if version is not None and version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version!r}, this version reads {FORMAT_VERSION}; prepare the "
            "data again"
        )
    try:
        with as_user_error("it"):
            _check_form(manifest)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}; prepare the data again") from error
    if not _is_whole(data, manifest):
        raise UserError(
            f"{path} is not as it was written: it is damaged, or was edited; restore it or prepare "
            "the data again"
        )
    return manifest


def _check_form(manifest: dict[str, Any]) -> None:
    """Checks that a manifest has all values that its readers use.

    Raises:
      UserError, KeyError, TypeError, AttributeError: a value is missing or wrong.
    """
    _count(manifest, "format_version")
    _text(manifest, "tokenizer_sha256")
    require(0 < _count(manifest, "vocab_size") < 2**31, "vocab_size is out of range")
    settings = check_type("settings", manifest["settings"], dict)
    if "pack_len" in settings:
        require(_count(settings, "pack_len") < 2**31, "pack_len is out of range")
    _optional(_text, manifest, "template_sha256")
    for kind in ("skipped", "changed", "left_out"):
        for count, first in manifest.get(kind, {}).values():
            require(type(count) is int and isinstance(first, str), f"{kind} has a wrong entry")
    for count in manifest.get("files", {}).values():
        require(type(count) is int, "files has a wrong entry")
    if "held_out" in manifest:
        _count(manifest["held_out"], "tokens")
        require(_text(manifest["held_out"], "why").isprintable(), "held_out has no reason")
    for name in SPLITS:
        split = manifest["splits"][name]
        for key in {"documents", "tokens", "text_bytes"} | (split.keys() - {"shards"}):
            _count(split, key)
        for shard in check_type("shards", split["shards"], list):
            _check_shard(shard)


def _check_shard(shard: dict[str, Any]) -> None:
    name = _text(shard, "name")
    # Names must be printable because messages of one line quote them.
    if not name or epath.Path(name).name != name or not name.isprintable():
        raise UserError(f"it names a shard outside its folder: {name!r}")
    for key in ("tokens", "documents"):
        _count(shard, key)
    _optional(_count, shard, "sequences")
    for key in ("sha256", "index_sha256"):
        _text(shard, key)
    for key in ("pack_sha256", "mask_sha256", "crc_sha256"):
        _optional(_text, shard, key)
    if "mask_sha256" in shard:
        _count(shard, "answer_tokens")
    ends = shard["ends_sha256"]
    require(
        ends.keys() <= {"bin", "idx", "pack", "mask"}, "ends_sha256 has an unknown kind of file"
    )
    for kind in ends:
        _text(ends, kind)


def _count(values: dict[str, Any], key: str) -> int:
    value: int = check_type(key, values[key], int)
    require(0 <= value < 2**63, f"{key}={value} is out of range")
    return value


def _text(values: dict[str, Any], key: str) -> str:
    text: str = check_type(key, values[key], str)
    return text


def _optional(check: Callable[..., Any], values: dict[str, Any], key: str) -> None:
    if key in values:
        check(values, key)


def source_folders(folder: epath.PathLike) -> dict[str, epath.Path]:
    """Returns the prepared sources in a folder, by name.

    They are the folder itself, with the name "", or the folders in it.

    Raises:
      UserError: there is no prepared source, or one is unfinished.
    """
    folder = epath.Path(folder)
    if (folder / MANIFEST).exists():
        return {"": folder}
    found = {}
    if folder.is_dir() and not (folder / PLAN).exists():
        for path in sorted(folder.iterdir(), key=str):
            if path.name.endswith(".partial"):  # unfinished work of an earlier version
                continue
            if (path / MANIFEST).exists():
                found[path.name] = path
            elif (path / PLAN).exists():
                raise no_shards(path)
    if not found:
        raise no_shards(folder)
    return found


def data_fingerprint(manifest: dict[str, Any]) -> str:
    """Returns the sha256 over the checksums of all shards, of the tokenizer and of the template.

    It identifies the tokens.
    """
    parts = [manifest["tokenizer_sha256"]]
    if template := manifest.get("template_sha256"):
        parts.append(template)
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            parts += [shard["sha256"], shard.get("pack_sha256", "")]
            if "mask_sha256" in shard:
                parts.append(shard["mask_sha256"])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def verify(folder: epath.PathLike) -> list[str]:
    """Returns the names of the files whose contents differ from the manifest; reads all files.

    Raises:
      UserError: there is no manifest, or it is damaged.
    """
    folder = epath.Path(folder)
    manifest = read_manifest(folder)
    expected = {TOKENIZER: manifest["tokenizer_sha256"]}
    if "template_sha256" in manifest:
        expected[TEMPLATE] = manifest["template_sha256"]
    for split in SPLITS:
        for shard in manifest["splits"][split]["shards"]:
            sums = {kind: shard[key] for key, kind in _SUMS.items() if key in shard}
            expected |= {f"{shard['name']}.{kind}": digest for kind, digest in sums.items()}
    return _changed(folder, expected)


def unchecked_remark(folders: Sequence[str]) -> str:
    """Returns the warning for folders with shards that have no checksums of their blocks."""
    return (
        f"an earlier version wrote shards in {', '.join(folders)} without checksums of blocks: "
        "reading them does not detect a damaged bit in the middle of a file; check them once with "
        + " and ".join(f"llama_jax.prepare --verify={folder}" for folder in folders)
    )


def ends_sha256(path: epath.PathLike, size: int) -> str:
    """Returns the sha256 of the first and the last `END_BYTES` of a file of `size` bytes.

    Raises:
      OSError: the file cannot be read.
    """
    with open_file(path) as file:
        digest = hashlib.sha256(file.read(END_BYTES))
        file.seek(max(0, size - END_BYTES))
        digest.update(file.read(END_BYTES))
    return digest.hexdigest()


def _changed(folder: epath.Path, expected: dict[str, str]) -> list[str]:
    """Returns the names of files whose sha256 is not the expected one, or that cannot be read."""
    found = sha256_of_each(folder / name for name in expected)
    return [name for name, digest in zip(expected, found, strict=True) if digest != expected[name]]


def check_files(folder: epath.Path, manifest: dict[str, Any], split: str) -> None:
    """Checks the files of a split cheaply: tokenizer, template, sizes and ends of files.

    Args:
      folder: folder of shards.
      manifest: its manifest.
      split: one of `SPLITS`.

    Raises:
      UserError: a file is missing, its size, beginning or end is not as it was written, or the
        tokenizer or the template is not the one that made the shards.
    """
    if _changed(folder, {TOKENIZER: manifest["tokenizer_sha256"]}):
        raise UserError(
            f"{folder / TOKENIZER} is not the tokenizer that made these shards; put back the "
            f"one with sha256 {manifest['tokenizer_sha256']}, or prepare the data again"
        )
    template = manifest.get("template_sha256", "")
    if template and _changed(folder, {TEMPLATE: template}):
        raise UserError(
            f"{folder / TEMPLATE} is missing, or not the template that made these shards; put "
            "it back, or prepare the data again"
        )
    dtype = token_dtype(manifest["vocab_size"])
    shards = manifest["splits"][split]["shards"]
    sizes = file_sizes(folder)
    for shard in shards:
        _check_size(folder, sizes, f"{shard['name']}.bin", shard["tokens"] * dtype.itemsize)
        _check_size(
            folder, sizes, f"{shard['name']}.idx", shard["documents"] * INDEX_DTYPE.itemsize
        )
        if "sequences" in shard:  # .pack begins with one value per sequence, and one more
            pack = f"{shard['name']}.pack"
            _check_size(folder, sizes, pack, None)
            if sizes[pack] < (shard["sequences"] + 1) * INDEX_DTYPE.itemsize:
                raise UserError(
                    f"{folder / pack} has {sizes[pack]} bytes, too few for the "
                    f"{shard['sequences']} sequences of the manifest; prepare the data again"
                )
        if "mask_sha256" in shard:
            _check_size(folder, sizes, f"{shard['name']}.mask", -(-shard["tokens"] // 8))
        if "crc_sha256" in shard:
            _check_size(folder, sizes, f"{shard['name']}.{CRC}", None)
    _check_contents(folder, sizes, shards)


def file_sizes(folder: epath.Path) -> dict[str, int]:
    """Returns the bytes of each file in a folder, from one listing; skips broken links."""
    if is_object_store(folder):
        return {path.name: path.stat().length for path in folder.iterdir()}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def _check_size(folder: epath.Path, sizes: dict[str, int], name: str, expected: int | None) -> None:
    if name not in sizes:
        raise UserError(f"{folder / name} is missing; the manifest lists it")
    if expected is not None and sizes[name] != expected:
        raise UserError(
            f"{folder / name} has {sizes[name]} bytes, the manifest says {expected}: it is "
            "truncated or replaced; restore it or prepare the data again"
        )


def _check_contents(
    folder: epath.Path, sizes: dict[str, int], shards: list[dict[str, Any]]
) -> None:
    """Compares the whole of .pack and .crc.json, and the ends of the other files.

    Shards of earlier versions have no .crc.json.

    Raises:
      UserError: a file cannot be read, or is not as it was written.
    """
    whole, ends = {}, {}
    for shard in shards:
        for key in ("pack_sha256", "crc_sha256"):
            if key in shard:
                whole[f"{shard['name']}.{_SUMS[key]}"] = shard[key]
        for kind, digest in shard["ends_sha256"].items():
            ends[f"{shard['name']}.{kind}"] = digest
    expected = ends | whole

    def first_other(names: list[str]) -> str:
        for name in names:
            try:
                if name in whole:
                    digest = sha256_of(f"{folder}/{name}")
                else:
                    digest = ends_sha256(f"{folder}/{name}", sizes[name])
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"cannot read {folder / name}: {reason}") from error
            if digest != expected[name]:
                return name
        return ""

    # Each task gets many files: starting a task takes longer than reading the ends of one file.
    names, each = list(expected), -(-len(expected) // _THREADS) or 1
    parts = [names[start : start + each] for start in range(0, len(names), each)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for name in filter(None, pool.map(first_other, parts)):
            raise UserError(
                f"{folder / name} is not the file in the manifest: it is damaged or "
                "replaced; restore it or prepare the data again"
            )
