"""Our own checkpoints, read and written one layer at a time.

Orbax saves and restores whole arrays. It stores them as zarr arrays in an OCDBT database, which
tensorstore reads and writes in parts. This module writes steps without optimiser state, which
`saved_step.load_params` reads like any other step.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from llama_jax.checkpoint import manifest, saved_step
from llama_jax.checkpoint.fingerprint import LayerPrints, changed_arrays, fingerprint
from llama_jax.errors import UserError, first_line
from llama_jax.interchange import formats, model_card
from llama_jax.interchange.formats import Description
from llama_jax.parameters import PARAMETERS
from llama_jax.text import tokenizer_files
from llama_jax.text.tokenizer import with_config
from llama_jax.text.tokenizer_config import config_with_special_tokens
from llama_jax.text.tokenizer_json import without_bos_eos

_CHUNK_SIZE = 2**25  # bytes
# Errors that tensorstore raises for damaged or missing files. It maps status codes to Python's
# exceptions: nearly always ValueError; NotImplementedError stands for UNIMPLEMENTED.
_TENSORSTORE_ERRORS = (ValueError, OSError, LookupError, OverflowError, NotImplementedError)


def _array_spec(params: epath.Path, path: str) -> dict[str, Any]:
    base = str(params.absolute())
    base = base if "://" in base else f"file://{base}"
    store = {"driver": "ocdbt", "base": base, "path": path.replace("/", ".") + "/"}
    return {"driver": "zarr", "kvstore": store}


def describe(folder: epath.Path, meta: saved_step.StepMeta) -> Description:
    """Returns what a saved step holds besides its weights.

    Raises:
      UserError: the tokenizer has more ids than the model has rows.
    """
    files = dict(meta.tokenizer_files)
    if meta.tokenizer_model.lstrip()[:1] == b"{":
        files.setdefault("tokenizer.json", without_bos_eos(meta.tokenizer_model))
    elif meta.tokenizer_model:  # `files` has the original if tokens were added to it
        files.setdefault("tokenizer.model", meta.tokenizer_model)
    tokenizer_files.check_vocabulary(files, meta.of_weights.model.vocab_size, str(folder))
    train = dataclasses.replace(meta.of_weights.train, seq_len=meta.context)
    config = dataclasses.replace(meta.of_weights, train=train)
    card = model_card.render(meta, folder)
    return Description(config, "float32", files, card, meta.step, seen=meta.seen)


class CkptSource:
    """A saved step; compares each array with its fingerprint when the last layer is read.

    Holds one array of one layer in memory. Exception: if a device of the training run held less
    than `saving.LAYER_BYTES` of that, the stack of all layers is read at once.
    """

    def __init__(self, folder: epath.Path) -> None:
        """Opens the folder of a step.

        Raises:
          UserError: the step is damaged, or its arrays do not match its config.
        """
        meta = saved_step.load_meta(folder)
        self._wanted = saved_step.load_fingerprints(folder)
        self._prints = LayerPrints(meta.of_weights.model.n_layers)
        model = meta.of_weights.model
        self.description = describe(folder, meta)
        self._stores: dict[str, Any] = {}
        for path, shape in formats.shapes(model).items():
            wanted = (model.n_layers, *shape) if PARAMETERS[path].is_stacked else shape
            try:
                store = ts.open(_array_spec(folder / "params", path), open=True, read=True).result()
            except _TENSORSTORE_ERRORS as error:
                raise UserError(f"{folder}/params lacks {path}, or it is damaged") from error
            if store.shape != wanted or store.dtype.name != "float32":
                raise UserError(
                    f"{folder}/params: {path} is {store.dtype.name} of shape {store.shape}, its "
                    f"config requires float32 of shape {wanted}"
                )
            self._stores[path] = store
        self._folder = folder
        self._block: tuple[str, int, Any] = ("", 0, None)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """Reads the array `path` of our tree; of a stacked array, the layer `layer`.

        Raises:
          UserError: the array cannot be read, or differs from what was saved (checked at the last
            layer).
        """
        array = self._read(path, layer)
        whole = self._prints.add(f"params/{path}", layer, array)
        saved_step.raise_if_changed(self._folder, changed_arrays(self._wanted, whole))
        return array

    def _read(self, path: str, layer: int | None) -> np.ndarray:
        store: Any = self._stores[path]
        try:
            if layer is None:
                return store.read().result()
            name, start, block = self._block
            if name != path or not start <= layer < start + len(block):
                depth = store.chunk_layout.read_chunk.shape[0]
                start = layer - layer % depth
                self._block = ("", 0, None)  # frees the previous block first
                block = store[start : min(start + depth, store.shape[0])].read().result()
                self._block = (path, start, block)
            if layer == start + len(block) - 1:  # an average holds many steps, not their blocks
                self._block = ("", 0, None)
            return block[layer - start]
        except _TENSORSTORE_ERRORS as error:
            where = f"{self._folder}/params/{path}"
            raise UserError(f"{where} cannot be read: {first_line(error)}") from error


def _tokenizer_of(files: Mapping[str, bytes], rows: int) -> bytes:
    """Returns the tokenizer of a checkpoint, from the files of its weights; b'' without one."""
    chosen = tokenizer_files.fitting(files, rows, "the source")
    if chosen is None:
        return b""
    return with_config(chosen.content, config_with_special_tokens(files), chosen.file)


def _write_description(
    workdir: epath.Path, description: Description, base: dict[str, int]
) -> tuple[epath.Path, saved_step.StepMeta]:
    """Starts a work directory with one step; returns the step's folder and its description."""
    files = dict(description.files)
    config = description.config
    (workdir / "config.json").write_text(config.to_json())
    tokenizer = _tokenizer_of(files, config.model.vocab_size)
    if files.get("tokenizer.model") == tokenizer:
        del files["tokenizer.model"]
    if tokenizer:
        (workdir / "tokenizer.model").write_bytes(tokenizer)
    meta = saved_step.StepMeta(
        config,
        0,
        saved_step.IMPORTED,
        tokenizer,
        tokenizer_files=files,
        base=base,
        seen=dict(description.seen),
    )
    folder = workdir / saved_step.CHECKPOINTS / "0"
    folder.mkdir(parents=True)
    saved_step.save_meta(folder, meta)
    return folder, meta


def _complete(folder: epath.Path, meta: saved_step.StepMeta, prints: dict[str, int]) -> None:
    """Writes fingerprints and manifest of a step whose arrays are written."""
    saved_step.save_meta(folder, dataclasses.replace(meta, fingerprint=prints))
    manifest.write(folder)


def write_adapters(
    workdir: epath.Path, description: Description, adapters: Any, base: dict[str, int]
) -> None:
    """Writes a new work directory with one step, 0, that has adapters and no optimiser state.

    Args:
      workdir: an empty folder.
      description: its config describes the adapters, and names the place of their base.
      adapters: adapters in NumPy.
      base: fingerprints of the base.
    """
    folder, meta = _write_description(workdir, description, base)
    with ocp.StandardCheckpointer() as writer:
        writer.save((folder / "params").absolute(), adapters)
    _complete(folder, meta, fingerprint({"params": jax.tree.map(jnp.asarray, adapters)}))


class CkptTarget:
    """A new work directory with one step, 0, that has weights and no optimiser state."""

    def __init__(self, workdir: epath.Path, description: Description) -> None:
        """Writes everything except the weights."""
        config = description.config
        folder, self._meta = _write_description(workdir, description, {})
        self._prints = LayerPrints(config.model.n_layers)
        self._params = folder / "params"
        self._params.mkdir()
        self._stores = {}
        for path, shape in formats.shapes(config.model).items():
            stacked = PARAMETERS[path].is_stacked
            whole = (config.model.n_layers, *shape) if stacked else shape
            # A layer is divided into chunks, which are compressed in parallel.
            rows = max(1, _CHUNK_SIZE // (4 * math.prod(shape[1:])))
            chunks = (min(rows, shape[0]), *shape[1:])
            self._stores[path] = self._create(path, whole, (1, *chunks) if stacked else chunks)
        self._write_orbax_metadata()

    def _create(self, path: str, shape: tuple[int, ...], chunks: tuple[int, ...]) -> Any:
        metadata = {
            "shape": shape,
            "chunks": chunks,
            "dtype": "<f4",
            "compressor": {"id": "zstd", "level": 1},
            "fill_value": None,
            "filters": None,
            "order": "C",
        }
        spec = {**_array_spec(self._params, path), "metadata": metadata}
        return ts.open(spec, create=True, open=False).result()

    def _write_orbax_metadata(self) -> None:
        """Writes orbax's two descriptions of the tree; a test compares them with orbax's own."""
        tree = {}
        for path, store in self._stores.items():
            keys = tuple(path.split("/"))
            value = {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(store.shape),
            }
            key_metadata = [{"key": key, "key_type": 2} for key in keys]
            tree[str(keys)] = {"key_metadata": key_metadata, "value_metadata": value}
        metadata = {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._params / "_METADATA").write_text(json.dumps(metadata))
        module = "orbax.checkpoint._src.handlers.standard_checkpoint_handler"
        handler = {"item_handlers": f"{module}.StandardCheckpointHandler", "metrics": {}}
        (self._params / "_CHECKPOINT_METADATA").write_text(json.dumps(handler))

    def write(self, path: str, layer: int | None, array: np.ndarray) -> None:
        """Writes an array as `Source.read` returns it.

        Args:
          path: path of the array in our tree.
          layer: index of the layer of a stacked array; None for other arrays.
          array: the array, of one layer if stacked.
        """
        store = self._stores[path]
        part = store if layer is None else store[layer]
        array = formats.cast(array, np.float32, path)
        self._prints.add(f"params/{path}", layer, array)
        try:
            part.write(array).result()
        except ValueError as error:  # tensorstore raises it for a full disk, too
            raise UserError(f"{self._params}: {first_line(error)}") from error

    def close(self) -> None:
        """Completes the step; `write` has already waited for every array."""
        _complete(self._params.parent, self._meta, self._prints.found)
