"""Adapters in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`.

Its names are those of Hugging Face's modules, its matrices (out, in) as everywhere there: A is
(rank, in), B (out, rank).
"""

import json
import math
from typing import Any

import numpy as np
from etils import epath

from llama_jax.config import Config, LoraConfig
from llama_jax.errors import UserError
from llama_jax.interchange import formats, hf, safetensors
from llama_jax.lora import matrix_shapes
from llama_jax.lora_config import MATRICES
from llama_jax.model_config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What would make other adapters of the same arrays, and its values that do not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "lora_bias": (None, False),
    **dict.fromkeys(("use_qalora", "use_bdlora"), (None, False)),
    **dict.fromkeys(
        ("target_parameters", "trainable_token_indices", "exclude_modules"), (None, [])
    ),
    **dict.fromkeys(("layer_replication", "alora_invocation_tokens"), (None, [])),
    **dict.fromkeys(("kasa_config", "monteclora_config", "arrow_config"), (None,)),
    # The others (pissa, olora, corda, loftq) change the base where PEFT loads them.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def _path(name: str) -> str:
    return f"layers/{MATRICES[name]}/{name}"


def _module(name: str) -> str:
    """Hugging Face's name of a matrix within its layer, such as `q_proj`."""
    return hf.NAMES[_path(name)].split(".")[-2]


def _tensor(name: str, layer: int, side: str) -> str:
    module = hf.name_of(_path(name), layer).removesuffix(".weight")
    return f"base_model.model.{module}.lora_{side}.weight"


def _tensors(model: ModelConfig, lora: LoraConfig) -> dict[str, tuple[str, int, str]]:
    """Their name -> matrix, layer and side."""
    return {
        _tensor(name, layer, side): (name, layer, side)
        for name in lora.names
        for layer in range(model.n_layers)
        for side in "AB"
    }


def _stored_shape(model: ModelConfig, lora: LoraConfig, name: str, side: str) -> tuple[int, int]:
    inputs, outputs = matrix_shapes(model)[name]
    return (lora.rank, math.prod(inputs)) if side == "A" else (math.prod(outputs), lora.rank)


def write(folder: epath.Path, config: Config, adapters: Any, dtype: str = "float32") -> None:
    """Writes adapters, in NumPy, into a folder."""
    model, lora = config.model, config.lora
    tensors = _tensors(model, lora)
    shapes = {to: _stored_shape(model, lora, name, side) for to, (name, _, side) in tensors.items()}
    stem = WEIGHTS.removesuffix(".safetensors")
    writer = safetensors.Writer(folder, shapes, hf.DTYPES[dtype], hf.SHARD_SIZE, stem)
    for to, (name, layer, side) in tensors.items():
        array = adapters["layers"][MATRICES[name]][name][side.lower()][layer]
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
        "target_modules": [_module(name) for name in lora.names],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")


def read_config(folder: epath.Path) -> tuple[LoraConfig, str]:
    """What adapters these are, and the name or folder of their base (empty if it is not told).

    Raises:
      UserError: there is no such file, or it describes what `LoraConfig` cannot.
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
        modules = values["target_modules"]
        dropout = float(values.get("lora_dropout") or 0.0)
        wrong = [name for name, plain in _PLAIN.items() if values.get(name) not in plain]
    except OSError as error:
        raise UserError(f"{folder} holds no adapters of PEFT: it has no {CONFIG}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no config of LoRA: {error!r}") from error
    if wrong:
        raise UserError(f"{path}: {wrong[0]}={values.get(wrong[0])!r} is not supported")
    ours = {_module(name): name for name in MATRICES}
    if not isinstance(modules, list) or not set(modules) <= set(ours):
        raise UserError(f"{path}: target_modules={modules!r} must be some of {', '.join(ours)}")
    if values.get("use_rslora"):  # which divides by the root of the rank
        alpha *= math.sqrt(rank)
    targets = ",".join(name for module, name in ours.items() if module in modules)
    lora = LoraConfig(rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    return lora, values.get("base_model_name_or_path") or ""


def read(folder: epath.Path, model: ModelConfig, lora: LoraConfig) -> Any:
    """The adapters for a model, in NumPy and float32, as `lora.init_adapters` makes them.

    Raises:
      UserError: a tensor is missing, extra, or of another shape than the model makes it.
    """
    file = folder / WEIGHTS
    if not file.exists():
        raise UserError(f"{folder} holds no adapters of PEFT: it has no {WEIGHTS}")
    entries = safetensors.read_header(file)
    tensors = _tensors(model, lora)
    for text, names in (
        ("lacks", set(tensors) - set(entries)),
        ("has", set(entries) - set(tensors)),
    ):
        if names:
            raise UserError(f"{file} {text} {min(names)}, against {CONFIG} and the base")
    layers: dict[str, Any] = {}
    for stored, (name, layer, side) in tensors.items():
        shape = _stored_shape(model, lora, name, side)
        if entries[stored].shape != shape:
            raise UserError(
                f"{file}: {stored} has shape {entries[stored].shape}, the base makes it {shape}"
            )
        inputs, outputs = matrix_shapes(model)[name]
        ours = (*inputs, lora.rank) if side == "A" else (lora.rank, *outputs)
        pair = layers.setdefault(MATRICES[name], {}).setdefault(name, {})
        stack = pair.setdefault(side.lower(), np.empty((model.n_layers, *ours), np.float32))
        stack[layer] = safetensors.read_rows(entries[stored]).T.reshape(ours)
    return {"layers": layers}
