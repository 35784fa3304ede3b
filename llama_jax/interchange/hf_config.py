"""Hugging Face's `config.json`, as versions 4 and 5 of transformers write it, and our config."""

import dataclasses
import json
from typing import Any

from llama_jax.config import Config, ModelConfig
from llama_jax.errors import UserError

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
# What transformers takes where a file is silent (LlamaConfig and MistralConfig).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None, "sliding_window": None},
    "mistral": {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
_COMMON = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "head_dim": None}
# Features that our model has not; each with the value that means "without".
_UNSUPPORTED = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu", None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}


def parse(text: str, name: str) -> Config:
    """Our config of a `config.json`; the dtype is not asked for, tensors tell theirs.

    Raises:
      UserError: it is not JSON, of an unknown architecture, or has what our model has not.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from error
    kind = _kind(values, name)
    values = {**_COMMON, **_DEFAULTS[kind], **values}
    for field, allowed in _UNSUPPORTED.items():
        if field in values and values[field] not in allowed:
            raise UserError(f"{name}: {field}={values[field]!r} is not supported")
    try:
        heads, dim = values["num_attention_heads"], values["hidden_size"]
        head_dim = values["head_dim"]
        model = ModelConfig(
            vocab_size=values["vocab_size"],
            dim=dim,
            n_layers=values["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=values["num_key_value_heads"] or heads,
            ffn_dim=values["intermediate_size"],
            explicit_head_dim=0 if head_dim is None or head_dim * heads == dim else head_dim,
            norm_eps=float(values["rms_norm_eps"]),
            # Llama's config may carry the field, its model does not look at it.
            sliding_window=(values["sliding_window"] or 0) if kind == "mistral" else 0,
            tied_embeddings=bool(values["tie_word_embeddings"]),
            **_rope(values, name),
        )
        config = Config(model=model)
        context = int(values["max_position_embeddings"])
        train = dataclasses.replace(config.train, seq_len=context)
    except KeyError as error:
        raise UserError(f"{name} does not tell {error.args[0]}") from error
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} has a field of the wrong type: {error}") from error
    return dataclasses.replace(config, train=train)


def _kind(values: Any, name: str) -> str:
    if not isinstance(values, dict):
        raise UserError(f"{name} is not a mapping")
    architectures = values.get("architectures") or []
    kind = values.get("model_type")
    if architectures:
        kind = ARCHITECTURES.get(architectures[0])
    if kind not in _DEFAULTS:
        found = architectures[0] if architectures else values.get("model_type")
        raise UserError(
            f"{name}: unknown architecture {found!r}; known: {', '.join(ARCHITECTURES)}"
        )
    return kind


def _rope(values: dict[str, Any], name: str) -> dict[str, Any]:
    """Fields of ours for RoPE: version 5 has `rope_parameters`, 4 `rope_theta`, `rope_scaling`."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    rope = dict(new if new is not None else old or {})
    theta = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    if new is not None and values.get("rope_theta", theta) != theta:
        raise UserError(f"{name}: rope_theta and rope_parameters disagree")
    for field in ("factor", "low_freq_factor", "high_freq_factor"):
        if new is not None and old and old.get(field) != rope.get(field):
            raise UserError(f"{name}: rope_scaling and rope_parameters disagree on {field}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{name}: RoPE of type {kind!r} is not supported; known: default, llama3")
    found = {"rope_theta": float(theta)}
    if kind == "llama3":
        found |= {
            "rope_scaling_factor": float(rope["factor"]),
            "rope_low_freq_factor": float(rope["low_freq_factor"]),
            "rope_high_freq_factor": float(rope["high_freq_factor"]),
            "rope_original_context": int(rope["original_max_position_embeddings"]),
        }
    return found


def write(config: Config, dtype: str, special: tuple[int | None, Any]) -> str:
    """A `config.json` that versions 4 and 5 of transformers read.

    Args:
      config: ours.
      dtype: of the weights.
      special: ids of BOS and EOS.
    """
    model = config.model
    architecture = "MistralForCausalLM" if model.sliding_window else "LlamaForCausalLM"
    rope: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling_factor != 1:
        rope = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_context,
        }
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": config.train.seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope if model.rope_scaling_factor != 1 else None,
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": special[0],
        "eos_token_id": special[1],
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }
    if model.sliding_window:
        values["sliding_window"] = model.sliding_window
    else:
        values |= {"attention_bias": False, "mlp_bias": False}
    return json.dumps(values, indent=2) + "\n"
