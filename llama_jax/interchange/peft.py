"""Adapters in PEFT's format: `adapter_model.safetensors` (or `.bin`) and `adapter_config.json`.

Tensors are named after Hugging Face's modules, and matrices are stored as (out, in): A is
(rank, in), B is (out, rank).
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from llama_jax.config import Config, LoraConfig, ModelConfig
from llama_jax.errors import UserError, as_user_error, check_type, require
from llama_jax.files import read_json
from llama_jax.interchange import formats, hf, pickles, safetensors
from llama_jax.interchange.peft_targets import MATRICES, module_of, short_name, targets_of
from llama_jax.interchange.safetensors import shown
from llama_jax.interchange.weight_files import Stored
from llama_jax.model.lora import adapter_of
from llama_jax.parameters import shape_of

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Settings that change what the adapters compute, each with the values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "modules_to_save": (None, []),
    "lora_bias": (None, False),
    **dict.fromkeys(("use_qalora", "use_bdlora"), (None, False)),
    **dict.fromkeys(("target_parameters", "trainable_token_indices"), (None, [])),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens"), (None, [])),
    **dict.fromkeys(("kasa_config", "monteclora_config", "arrow_config"), (None,)),
    # With other values (pissa, olora, corda, loftq), PEFT changes the base when it loads adapters.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def _tensor(name: str, layer: int, side: str) -> str:
    return f"base_model.model.{module_of(name, layer)}.lora_{side}.weight"


def _tensors(model: ModelConfig, lora: LoraConfig) -> dict[str, tuple[str, int, str]]:
    """Returns name of a tensor -> matrix, layer and side (A or B)."""
    return {
        _tensor(name, layer, side): (name, layer, side)
        for name in lora.names
        for layer in range(model.n_layers)
        for side in "AB"
    }


def _stored_shape(model: ModelConfig, lora: LoraConfig, name: str, side: str) -> tuple[int, int]:
    row = MATRICES[name]
    if side == "A":
        return lora.rank, math.prod(shape_of(row.inputs, model))
    return math.prod(shape_of(row.outputs, model)), lora.rank


def write(folder: epath.Path, config: Config, adapters: Any, dtype: str = "float32") -> None:
    """Writes adapters into a folder.

    Args:
      folder: an existing folder.
      config: config of the run, with the base of the adapters as `init_from`.
      adapters: adapters in NumPy, in the tree of `lora.init_adapters`.
      dtype: name of the dtype in which they are stored.
    """
    model, lora = config.model, config.lora
    tensors = _tensors(model, lora)
    shapes = {to: _stored_shape(model, lora, name, side) for to, (name, _, side) in tensors.items()}
    stem = WEIGHTS.removesuffix(".safetensors")
    writer = safetensors.Writer(folder, shapes, hf.DTYPES[dtype], hf.SHARD_SIZE, stem)
    for to, (name, layer, side) in tensors.items():
        adapter = adapter_of(adapters, MATRICES[name].path)
        array = adapter[side.lower()][layer]
        stored = array.reshape(shapes[to][::-1]).T
        writer.write(to, formats.cast(stored, hf.DTYPES[dtype], to))
    writer.close()
    kind, _, base = config.init_from.partition(":")
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base if kind == "hf" else None,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [short_name(name) for name in lora.names],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def read_config(folder: epath.Path) -> tuple[LoraConfig, str]:
    """Reads the config of adapters, and the name or folder of their base ('' if not given).

    Our adapters are alike in all layers. So this examines the first layer only; `read` checks the
    others.

    Raises:
      UserError: the file does not exist, or `LoraConfig` cannot express what it describes.
    """
    values = _values(folder)
    base = values.get("base_model_name_or_path") or ""
    with _named(folder):
        return _lora(values, 1), check_type("base_model_name_or_path", base, str)


@contextlib.contextmanager
def _named(folder: epath.Path) -> Iterator[None]:
    """Makes errors in the block begin with the path of the config."""
    try:
        with as_user_error("it"):
            yield
    except UserError as error:
        raise UserError(f"{folder / CONFIG} is not a supported LoRA config: {error}") from error


def _values(folder: epath.Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder} holds no adapters of PEFT: it has no {CONFIG}")
    values = read_json(path)
    wrong = [name for name, plain in _PLAIN.items() if values.get(name) not in plain]
    if wrong:
        raise UserError(f"{path}: {wrong[0]}={values.get(wrong[0])!r:.200} is not supported")
    return values


def _lora(values: dict[str, Any], n_layers: int) -> LoraConfig:
    """Returns the config of adapters that are alike in all `n_layers` layers of a model."""
    targets = targets_of(values, n_layers)
    if len(set(targets.values())) > 1:
        raise UserError("several ranks or alphas (rank_pattern, alpha_pattern) are not supported")
    target = next(iter(targets.values()))
    names = [name for name in MATRICES if (name, 0) in targets]
    if len(targets) != len(names) * n_layers:
        raise UserError(
            f"adapters of some layers only are not supported; the base has {n_layers} layers "
            "(target_modules, layers_to_transform, exclude_modules)"
        )
    alpha = target.alpha
    if values.get("use_rslora"):  # rsLoRA divides alpha by the root of the rank
        alpha *= math.sqrt(max(target.rank, 0))
    dropout = check_type("lora_dropout", values.get("lora_dropout") or 0.0, float)
    require(target.rank > 0, f"r must be positive, got {target.rank}")
    return LoraConfig(rank=target.rank, alpha=alpha, dropout=dropout, targets=",".join(names))


def _entries(folder: epath.Path) -> tuple[epath.Path, dict[str, Stored]]:
    """Returns the file with the adapters, and its tensors; prefers safetensors, as PEFT does."""
    for name, read_file in ((WEIGHTS, safetensors.read_header), (PICKLE, pickles.read_tensors)):
        file = folder / name
        if file.exists():
            found: dict[str, Stored] = {}
            for key, entry in read_file(file).items():
                # Old versions and hand-made files include the name of the adapter.
                plain = re.sub(r"(\.lora_[AB])\.default\.weight$", r"\1.weight", key)
                if plain in found:
                    raise UserError(f"{file} has {plain} with and without the adapter's name")
                found[plain] = entry
            return file, found
    raise UserError(f"{folder} holds no adapters of PEFT: it has no {WEIGHTS}, and no {PICKLE}")


def read(folder: epath.Path, model: ModelConfig, lora: LoraConfig) -> Any:
    """Reads adapters into NumPy and float32, in the tree of `lora.init_adapters`.

    Args:
      folder: folder of PEFT's files.
      model: config of the base.
      lora: config of the adapters, from `read_config`.

    Raises:
      UserError: the adapters of the layers differ; a tensor is missing, extra, or has another shape
        than the model requires.
    """
    values = _values(folder)
    with _named(folder):
        _lora(values, model.n_layers)
    file, entries = _entries(folder)
    tensors = _tensors(model, lora)
    for text, names in (
        ("lacks", set(tensors) - set(entries)),
        ("has", set(entries) - set(tensors)),
    ):
        if names:
            raise UserError(f"{file} {text} {shown(min(names))}, contrary to {CONFIG} and the base")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for stored, (name, layer, side) in tensors.items():
        shape = _stored_shape(model, lora, name, side)
        if entries[stored].shape != shape:
            raise UserError(
                f"{file}: {stored} has shape {entries[stored].shape}, the base requires {shape}"
            )
        row = MATRICES[name]
        inputs, outputs = shape_of(row.inputs, model), shape_of(row.outputs, model)
        ours = (*inputs, lora.rank) if side == "A" else (lora.rank, *outputs)
        pair = pairs.setdefault(row.path, {})
        stack = pair.setdefault(side.lower(), np.empty((model.n_layers, *ours), np.float32))
        stack[layer] = entries[stored].rows().T.reshape(ours)
    return traverse_util.unflatten_dict(pairs, sep="/")
