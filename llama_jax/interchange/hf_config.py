"""Converts Hugging Face's `config.json`, as of transformers 4 and 5, to our config and back."""

import dataclasses
import json
from typing import Any

from llama_jax.config import Config, ModelConfig
from llama_jax.errors import UserError, as_user_error
from llama_jax.files import parse_json
from llama_jax.interchange import rope_config
from llama_jax.interchange.fields import Fields, errors_in_file_terms, short

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
# Defaults of transformers for absent fields (LlamaConfig and MistralConfig).
_CONTEXT = {"llama": 2048, "mistral": 131_072}
_WINDOW = 4096  # Mistral only
_NAMES = {
    **rope_config.NAMES,
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "explicit_head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
_READ = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "max_sequence_length"),
    *("sliding_window", "use_sliding_window", "layer_types", "max_window_layers"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"),
    "partial_rotary_factor",
}
# Fields that do not change the logits: of any model in transformers 4 and 5, of training, and of
# tools that write into the file. pretraining_tp splits each product into parts with the same sum.
_HARMLESS = """
    _name_or_path name_or_path _commit_hash _attn_implementation attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled
    _from_model_config _experts_implementation transformers_version transformers_weights
    torch_dtype dtype use_bfloat16 torchscript tf_legacy_loss use_cache return_dict
    return_dict_in_generate output_attentions output_hidden_states output_scores output_logits
    finetuning_task task_specific_params problem_type id2label label2id num_labels
    tokenizer_class prefix auto_map custom_pipelines chunk_size_feed_forward
    tie_last_hidden_states keys_to_ignore_at_inference bos_token_id eos_token_id pad_token_id
    sep_token_id unk_token_id decoder_start_token_id is_decoder is_llama_config
    initializer_range initializer_factor pretraining_tp gradient_checkpointing attention_dropout
    attention_probs_dropout_prob hidden_dropout hidden_dropout_prob resid_pdrop embd_pdrop
    attn_pdrop dropout classifier_dropout mlp_dropout use_flash_attention use_flash_attention_2
    use_flash_attn use_sdpa model_max_length unsloth_version unsloth_fixed unsloth_training_args
    max_seq_len seq_length onnx mlx_version license language datasets tags base_model
"""
# Settings of generation, which older versions kept in this file.
_GENERATION = """
    max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings
    do_sample num_beams num_beam_groups use_mtp cache_implementation cache_config max_cache_len
    temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size
    bad_words_ids constraints encoder_no_repeat_ngram_size renormalize_logits
    forced_bos_token_id force_words_ids forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
    token_healing guidance_scale watermarking_config num_return_sequences is_assistant
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind
    target_lookbehind assistant_ensemble_weight speculation_type return_legacy_cache
    transformers.js_config compile_config disable_compile continuous_batching_config low_memory
    penalty_alpha dola_layers prefill_chunk_size generation_config
"""
# Fields of features that our model lacks, each with the values that turn the feature off.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("hidden_act", "hidden_activation"), ("silu", "swish")),
    **dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias"), (False,)),
    **dict.fromkeys(("attention_out_bias", "o_proj_bias", "lm_head_bias", "head_bias"), (False,)),
    **dict.fromkeys(("qk_layernorm", "qk_norm", "use_qk_norm", "use_qk_layernorm"), (False,)),
    **dict.fromkeys(("add_cross_attention", "is_encoder_decoder", "tie_encoder_decoder"), (False,)),
    **dict.fromkeys(("alibi", "rope_interleaved", "attention_sinks", "scale_embedding"), (False,)),
    **dict.fromkeys(("is_heterogeneous", "use_parallel_residual", "parallel_attn"), (False,)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), (1, 1.0)),
    **dict.fromkeys(("rotary_pct", "logit_scale", "scale_emb", "rope_ratio"), (1, 1.0)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0,)),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers", "attention_chunk_size"), (0,)),
    **dict.fromkeys(("no_rope_layers", "per_layer_config", "pruned_heads"), ({}, [])),
    "cross_attention_hidden_size": (),
    "quantization_config": (),
}


def parse(content: bytes | str, name: str) -> Config:
    """Returns our config for a `config.json`; its dtype is ignored, because tensors have their own.

    A field that is not known to leave the logits unchanged raises an error.

    Raises:
      UserError: the content is not JSON, the architecture is unknown, the model has a feature that
        ours lacks, or a field has a wrong value.
    """
    with as_user_error(name):
        fields = Fields(parse_json(content, name), name)
        kind = _kind(fields)
        fields.refuse_others({*_READ, *_HARMLESS.split(), *_GENERATION.split()}, _WITHOUT)
        context = fields.size("max_position_embeddings", _CONTEXT[kind])
        heads, dim = fields.size("num_attention_heads"), fields.size("hidden_size")
        head_dim = fields.size("head_dim") if fields.given("head_dim") else 0
        values: dict[str, Any] = {
            "vocab_size": fields.size("vocab_size"),
            "dim": dim,
            "n_layers": fields.size("num_hidden_layers"),
            "n_heads": heads,
            "n_kv_heads": _kv_heads(fields, kind, heads),
            "ffn_dim": fields.size("intermediate_size"),
            "explicit_head_dim": 0 if head_dim * heads == dim else head_dim,
            "norm_eps": fields.positive("rms_norm_eps", 1e-6),
            "sliding_window": _window(fields, kind),
            "tied_embeddings": fields.given("tie_word_embeddings")
            and fields.get("tie_word_embeddings", bool),
            **rope_config.read(fields, context),
        }
        with errors_in_file_terms(name, _NAMES):
            config = Config(model=ModelConfig(**values))
        context = _context(fields, config.model, context)
        return dataclasses.replace(config, train=dataclasses.replace(config.train, seq_len=context))


def _kind(fields: Fields) -> str:
    """Returns the family of the model: llama or mistral."""
    given = fields.values.get("architectures") or []
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        raise UserError(f"{fields.name('architectures')} must be a list of names")
    kinds = {ARCHITECTURES.get(item): item for item in given}
    model_type = fields.get("model_type", str) if fields.given("model_type") else None
    if not kinds:
        kinds = {model_type if model_type in ARCHITECTURES.values() else None: model_type or ""}
    if None in kinds:
        raise UserError(
            f"{fields.file}: unknown architecture {short(kinds[None])}; "
            f"known: {', '.join(ARCHITECTURES)}"
        )
    kind = next(iter(kinds))
    if len(kinds) > 1 or model_type not in (None, kind):
        raise UserError(f"{fields.file}: architectures and model_type disagree")
    assert kind is not None
    return kind


def _kv_heads(fields: Fields, kind: str, heads: int) -> int:
    if fields.values.get("num_key_value_heads", 0) is None:
        return heads
    return fields.size("num_key_value_heads", heads if kind == "llama" else 8)


def _window(fields: Fields, kind: str) -> int:
    """Returns the attention window in tokens, 0: unlimited; refuses windows in some layers only."""
    window = 0
    if kind == "mistral" and fields.values.get("sliding_window", 0) is not None:
        window = fields.size("sliding_window", _WINDOW)
    # Llama's config may have this field, but its model ignores it.
    says = {"full_attention": False, "sliding_attention": True}
    if fields.given("use_sliding_window"):
        _require_window(
            fields, "use_sliding_window", fields.get("use_sliding_window", bool), window
        )
    if fields.given("layer_types"):
        types = fields.get("layer_types", list)
        layers = fields.size("num_hidden_layers")
        if len(types) != layers or not all(
            item == types[0] and item in list(says) for item in types
        ):
            raise UserError(
                f"{fields.name('layer_types')}={short(types)} is not supported: it must name the "
                f"same attention {layers} times, {' or '.join(says)}"
            )
        _require_window(fields, "layer_types", says[types[0]], window)
    if fields.given("max_window_layers") and window:
        raise UserError(f"{fields.name('max_window_layers')} is not supported with sliding_window")
    return window


def _require_window(fields: Fields, field: str, wanted: bool, window: int) -> None:
    if wanted != bool(window):
        value = short(fields.values[field])
        found = f"sliding_window={window}" if window else "a model without a sliding window"
        raise UserError(f"{fields.name(field)}={value} does not fit {found}")


def _context(fields: Fields, model: ModelConfig, context: int) -> int:
    """Returns the longest sequence that the weights support, in tokens."""
    if fields.given("max_sequence_length"):  # in Vicuna and LongChat
        return max(context, fields.size("max_sequence_length"))
    # With these kinds of RoPE, max_position_embeddings may be the context before stretching.
    kinds = ("dynamic", "yarn")
    original = model.rope_scaling in kinds and model.rope_original_context == context
    return model.stretched_context if original else context


def to_json(config: Config, dtype: str, special: tuple[int | None, Any]) -> str:
    """Returns a `config.json` that versions 4 and 5 of transformers can read.

    Args:
      config: our config.
      dtype: name of the dtype of the weights.
      special: ids of BOS and EOS.
    """
    model = config.model
    architecture = "MistralForCausalLM" if model.sliding_window else "LlamaForCausalLM"
    rope = rope_config.parameters(model)
    # Dynamic RoPE reads max_position_embeddings as the context before stretching.
    dynamic = model.rope_scaling == "dynamic"
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
        "max_position_embeddings": model.rope_original_context if dynamic else config.train.seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
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
