"""Adapters in PEFT's format: `adapter_model.safetensors` (or `.bin`) and `adapter_config.json`.

Its names are those of Hugging Face's modules, its matrices (out, in) as everywhere there: A is
(rank, in), B (out, rank).
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
from llama_jax.interchange.peft_targets import module_of, short_name, targets_of
from llama_jax.interchange.safetensors import shown
from llama_jax.interchange.weight_files import Stored
from llama_jax.model.lora import adapter_of
from llama_jax.parameters import layer_matrices, shape_of

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# What would make other adapters of the same arrays, and its values that do not.
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
    # The others (pissa, olora, corda, loftq) change the base where PEFT loads them.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def _tensor(name: str, layer: int, side: str) -> str:
    return f"base_model.model.{module_of(name, layer)}.lora_{side}.weight"


def _tensors(model: ModelConfig, lora: LoraConfig) -> dict[str, tuple[str, int, str]]:
    """Their name -> matrix, layer and side."""
    return {
        _tensor(name, layer, side): (name, layer, side)
        for name in lora.names
        for layer in range(model.n_layers)
        for side in "AB"
    }


def _stored_shape(model: ModelConfig, lora: LoraConfig, name: str, side: str) -> tuple[int, int]:
    row = layer_matrices()[name]
    if side == "A":
        return lora.rank, math.prod(shape_of(row.inputs, model))
    return math.prod(shape_of(row.outputs, model)), lora.rank


def write(folder: epath.Path, config: Config, adapters: Any, dtype: str = "float32") -> None:
    """Writes adapters, in NumPy, into a folder."""
    model, lora = config.model, config.lora
    tensors = _tensors(model, lora)
    shapes = {to: _stored_shape(model, lora, name, side) for to, (name, _, side) in tensors.items()}
    stem = WEIGHTS.removesuffix(".safetensors")
    writer = safetensors.Writer(folder, shapes, hf.DTYPES[dtype], hf.SHARD_SIZE, stem)
    for to, (name, layer, side) in tensors.items():
        adapter = adapter_of(adapters, layer_matrices()[name].path)
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
    """What adapters these are, and the name or folder of their base (empty if it is not told).

    Ours are alike in all layers, so the first layer tells; `read` checks the others.

    Raises:
      UserError: there is no such file, or it describes what `LoraConfig` cannot.
    """
    values = _values(folder)
    base = values.get("base_model_name_or_path") or ""
    with _named(folder):
        return _lora(values, 1), check_type("base_model_name_or_path", base, str)


@contextlib.contextmanager
def _named(folder: epath.Path) -> Iterator[None]:
    """Errors inside begin with the config's place."""
    try:
        with as_user_error("it"):
            yield
    except UserError as error:
        raise UserError(
            f"{folder / CONFIG} is no config of LoRA that is supported: {error}"
        ) from error


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
    """The adapters of a model with `n_layers`, which are alike in all of them."""
    targets = targets_of(values, n_layers)
    if len(set(targets.values())) > 1:
        raise UserError("several ranks or alphas (rank_pattern, alpha_pattern) are not supported")
    target = next(iter(targets.values()))
    names = [name for name in layer_matrices() if (name, 0) in targets]
    if len(targets) != len(names) * n_layers:
        raise UserError(
            f"adapters of some layers only are not supported, and the base has {n_layers} "
            "(target_modules, layers_to_transform, exclude_modules)"
        )
    alpha = target.alpha
    if values.get("use_rslora"):  # which divides by the root of the rank
        alpha *= math.sqrt(max(target.rank, 0))
    dropout = check_type("lora_dropout", values.get("lora_dropout") or 0.0, float)
    require(target.rank > 0, f"r must be positive, got {target.rank}")
    return LoraConfig(rank=target.rank, alpha=alpha, dropout=dropout, targets=",".join(names))


def _entries(folder: epath.Path) -> tuple[epath.Path, dict[str, Stored]]:
    """The file with the adapters, safetensors before a pickle as in PEFT, and its tensors."""
    for name, read_file in ((WEIGHTS, safetensors.read_header), (PICKLE, pickles.read_tensors)):
        file = folder / name
        if file.exists():
            found: dict[str, Stored] = {}
            for key, entry in read_file(file).items():
                # The name of the adapter, which old versions and hand-made files have.
                plain = re.sub(r"(\.lora_[AB])\.default\.weight$", r"\1.weight", key)
                if plain in found:
                    raise UserError(f"{file} has {plain} with and without the adapter's name")
                found[plain] = entry
            return file, found
    raise UserError(f"{folder} holds no adapters of PEFT: it has no {WEIGHTS}, and no {PICKLE}")


def read(folder: epath.Path, model: ModelConfig, lora: LoraConfig) -> Any:
    """The adapters for a model, in NumPy and float32, as `lora.init_adapters` makes them.

    Raises:
      UserError: the config means other adapters in the model's other layers than in its first; a
        tensor is missing, extra, or of another shape than the model makes it.
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
            raise UserError(f"{file} {text} {shown(min(names))}, against {CONFIG} and the base")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for stored, (name, layer, side) in tensors.items():
        shape = _stored_shape(model, lora, name, side)
        if entries[stored].shape != shape:
            raise UserError(
                f"{file}: {stored} has shape {entries[stored].shape}, the base makes it {shape}"
            )
        row = layer_matrices()[name]
        inputs, outputs = shape_of(row.inputs, model), shape_of(row.outputs, model)
        ours = (*inputs, lora.rank) if side == "A" else (lora.rank, *outputs)
        pair = pairs.setdefault(row.path, {})
        stack = pair.setdefault(side.lower(), np.empty((model.n_layers, *ours), np.float32))
        stack[layer] = entries[stored].rows().T.reshape(ours)
    return traverse_util.unflatten_dict(pairs, sep="/")
