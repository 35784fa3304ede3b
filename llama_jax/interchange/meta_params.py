"""Converts Meta's `params.json` to our config and back."""

import json
from typing import Any

from etils import epath

from llama_jax.config import Config, ModelConfig
from llama_jax.errors import UserError
from llama_jax.files import read_json
from llama_jax.interchange.fields import Fields, errors_in_file_terms

# Settings that Meta has no name for are stored under our names.
_ROPE = {
    "llama3": ("scaling_factor", "low_freq_factor", "high_freq_factor", "original_context"),
    "linear": ("scaling_factor",),
    "dynamic": ("scaling_factor", "original_context"),
    "yarn": (
        *("scaling_factor", "original_context", "beta_fast", "beta_slow"),
        *("truncate", "attention_factor"),
    ),
}
_READ = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "max_seq_len"),
    *("head_dim", "sliding_window", "rope_theta", "use_scaled_rope", "rope_scaling"),
}
# The size of the MLP comes from the tensors; the other fields control how Meta's code runs.
_HARMLESS = {
    *("multiple_of", "ffn_dim_multiplier", "hidden_dim", "max_batch_size", "model_parallel_size"),
    *("use_kv_cache", "use_cache", "dtype", "torch_dtype", "tokenizer_path", "ckpt_dir"),
}
_WITHOUT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("vision_chunk_size", "vision_max_num_chunks"), (-1,)),
    "vision_num_cross_attention_layers": (-1,),
    **dict.fromkeys(("use_qk_norm", "attn_temperature_tuning", "use_biases"), (False,)),
    **dict.fromkeys(("attention_chunk_size", "nope_layer_interval"), (-1, 0)),
    **dict.fromkeys(("moe", "moe_args", "quantization_args", "lora_args"), ()),
}


def read(path: epath.Path) -> Fields:
    """Reads the fields of `params.json`.

    Raises:
      UserError: the file cannot be read, is not a JSON object, or has an unsupported field that may
        change what the model computes.
    """
    params = Fields(read_json(path), str(path))
    rope = {f"rope_{name}" for names in _ROPE.values() for name in names}
    params.refuse_others(_READ | _HARMLESS | rope, _WITHOUT)
    return params


def model_of(params: Fields, vocab_size: int, ffn_dim: int, tied: bool) -> ModelConfig:
    """Returns our config of the model.

    Args:
      params: fields from `read`.
      vocab_size: rows of the embedding.
      ffn_dim: size of the MLP.
      tied: whether the output matrix is the embedding.

    Raises:
      UserError: a field is missing, of the wrong type, or does not fit the others.
    """
    if params.values.get("vocab_size", -1) not in (-1, vocab_size):
        given = params.size("vocab_size")
        raise UserError(
            f"{params.name('vocab_size')}={given}, but the embedding has {vocab_size} rows"
        )
    heads = params.size("n_heads")
    optional = {
        name: params.size(name) for name in ("n_kv_heads", "head_dim") if params.given(name)
    }
    window = params.get("sliding_window", int) if params.given("sliding_window") else 0
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "dim": params.size("dim"),
        "n_layers": params.size("n_layers"),
        "n_heads": heads,
        "n_kv_heads": optional.get("n_kv_heads", heads),
        "ffn_dim": ffn_dim,
        "explicit_head_dim": optional.get("head_dim", 0),
        "norm_eps": params.positive("norm_eps"),
        "sliding_window": window,
        "tied_embeddings": tied,
        "rope_theta": params.positive("rope_theta", 10_000.0),
    }
    values |= _rope(params, tied)
    with errors_in_file_terms(params.file, {"explicit_head_dim": "head_dim"}):
        return ModelConfig(**values)


def _rope(params: Fields, tied: bool) -> dict[str, Any]:
    """Returns our fields of RoPE: as in Meta's own code (llama3), or stored under our names."""
    kind = params.get("rope_scaling", str) if params.given("rope_scaling") else ""
    if params.given("use_scaled_rope") and params.get("use_scaled_rope", bool):
        kind = kind or "llama3"
    if not kind:
        return {}
    if kind not in _ROPE:
        known = ", ".join(_ROPE)
        raise UserError(f"{params.name('rope_scaling')}={kind!r} is not supported; known: {known}")
    found: dict[str, Any] = {"rope_scaling": kind}
    if kind == "llama3":
        # Llama 3.2, whose small models are tied, stretches by 32; its params.json may omit that.
        found["rope_scaling_factor"] = 32.0 if tied else 8.0
    types = {"rope_truncate": bool, "rope_original_context": int}
    for field in (f"rope_{name}" for name in _ROPE[kind]):
        if params.given(field):
            found[field] = params.get(field, types.get(field, float))
    return found


def to_json(config: Config) -> str:
    """Returns a `params.json`, with our names for settings that Meta has no name for."""
    model = config.model
    values: dict[str, Any] = {
        "dim": model.dim,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "vocab_size": model.vocab_size,
        # Meta's code computes ffn_dim as the multiple of this above 2/3 x 4 dim x the multiplier.
        "multiple_of": model.ffn_dim,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "max_seq_len": config.train.seq_len,
    }
    if model.explicit_head_dim:
        values["head_dim"] = model.explicit_head_dim
    if model.sliding_window:
        values["sliding_window"] = model.sliding_window
    if model.rope_is_stretched:
        kind = model.rope_scaling
        values |= {"use_scaled_rope": True} if kind == "llama3" else {"rope_scaling": kind}
        values |= {f"rope_{name}": getattr(model, f"rope_{name}") for name in _ROPE[kind]}
    return json.dumps(values, indent=2) + "\n"


def habitual_context(model: ModelConfig) -> int:
    """Returns the usual context of models with such RoPE, in tokens.

    LLaMA-2 (4096) has the same RoPE as LLaMA (2048), and gets 2048.
    """
    if model.rope_is_stretched:
        return 131_072 if model.rope_scaling == "llama3" else model.stretched_context
    return {500_000.0: 8192, 1_000_000.0: 16_384}.get(model.rope_theta, 2048)
