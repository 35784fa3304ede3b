"""Accepted values of `config.json`; `test_transfer_parity` compares models with transformers."""

import json

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.interchange import hf_config
from llama_jax.interchange.hf import HfSource
from tests.interchange.test_transfer import FAMILY, GROUPED, exported

# Written by transformers 4.57.1 as json.dumps(LlamaConfig(..).to_dict()), without null values and
# with the sizes of a test.
VERSION_4 = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    **{"head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-06, "rope_theta": 10000.0},
    **{"rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False},
    **{"initializer_range": 0.02, "pretraining_tp": 1, "use_cache": True, "return_dict": True},
    **{"output_hidden_states": False, "output_attentions": False, "torchscript": False},
    **{"use_bfloat16": False, "tf_legacy_loss": False, "pruned_heads": {}, "prefix": None},
    **{"tie_word_embeddings": False, "chunk_size_feed_forward": 0, "is_encoder_decoder": False},
    **{"is_decoder": False, "cross_attention_hidden_size": None, "add_cross_attention": False},
    **{"tie_encoder_decoder": False, "max_length": 20, "min_length": 0, "do_sample": False},
    **{"early_stopping": False, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0},
    **{"temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0},
    **{"length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0},
    **{"num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False},
    **{"remove_invalid_values": False, "architectures": ["LlamaForCausalLM"], "bos_token_id": 1},
    **{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
    **{"eos_token_id": 2, "task_specific_params": None, "problem_type": None, "_name_or_path": ""},
    **{"transformers_version": "4.57.1", "model_type": "llama", "dtype": "bfloat16"},
}


def parse(values):
    return hf_config.parse(json.dumps(values), "config.json")


def error_of(values):
    with pytest.raises(UserError) as caught:
        parse(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(name="llama2"):
    return json.loads(hf_config.to_json(FAMILY[name], "float32", (1, 2)))


def test_a_whole_file_of_version_4():
    model = parse(VERSION_4).model
    assert (model.dim, model.n_kv_heads, model.rope_is_stretched) == (32, 2, False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("attention_multiplier", 0.1), ("embedding_multiplier", 12.0), ("logits_scaling", 8)),
        *(("residual_multiplier", 0.22), ("query_pre_attn_scalar", 256), ("clip_qkv", 8.0)),
        *(("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)),
        *(("use_qk_norm", True), ("qk_layernorm", True), ("attention_sinks", True)),
        *(("num_experts", 8), ("num_local_experts", 8), ("no_rope_layers", [1, 0])),
        *(("rope_interleaved", True), ("partial_rotary_factor", 0.5), ("mlp_bias", True)),
        *(("per_layer_config", {"0": {"head_dim": 4}}), ("pruned_heads", {"0": [1]})),
        *(("hidden_act", "gelu"), ("is_encoder_decoder", True), ("xyz", 1), ("xyz", False)),
        *(("attention_bias", 0), ("embedding_multiplier", True), ("alibi", True)),
        *(("quantization_config", {}), ("text_config", {"hidden_size": 8})),
    ],
)
def test_a_field_that_may_change_the_logits(field, value):
    assert f"config.json: {field}" in error_of({**written(), field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("attention_multiplier", None), ("embedding_multiplier", 1.0), ("logits_scaling", 1)),
        *(("xyz", None), ("use_qk_norm", False), ("hidden_act", "swish"), ("pretraining_tp", 4)),
        *(("partial_rotary_factor", 1.0), ("quantization_config", None), ("no_rope_layers", [])),
        *(("unsloth_version", "2025.1"), ("auto_map", {"AutoConfig": "c.C"}), ("tags", ["a"])),
        *(("repetition_penalty", 1.3), ("attention_dropout", 0.1), ("torchscript", True)),
        *(("architectures", None), ("architectures", []), ("model_type", None)),
        ("architectures", ["LlamaForCausalLM", "LlamaForCausalLM"]),
        *(("layer_types", None), ("layer_types", ["full_attention"] * 2)),
        *(("use_sliding_window", False), ("max_window_layers", 28), ("sliding_window", 4)),
    ],
)
def test_a_field_that_changes_nothing(field, value):
    assert parse({**written(), field: value}) == parse(written())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of names"),
        ({"architectures": [3]}, "architectures must be a list of names"),
        ({"architectures": ["LlamaModel"]}, "unknown architecture 'LlamaModel'"),
        (
            {"architectures": ["LlamaForCausalLM", "GemmaForCausalLM"]},
            "unknown architecture 'GemmaForCausalLM'",
        ),
        (
            {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]},
            "architectures and model_type disagree",
        ),
        ({"model_type": "mistral"}, "architectures and model_type disagree"),
        ({"model_type": ["llama"]}, "model_type must be of type str"),
        ({"architectures": None, "model_type": None}, "unknown architecture ''"),
    ],
)
def test_architectures(changes, message):
    assert message in error_of({**written(), **changes})


def test_a_factor_of_1_is_none():
    """The fields then equal the defaults, which matters because `init_from` compares them."""
    for kind in ("linear", "llama3"):
        values = rope(type=kind, factor=1.0)
        if kind == "llama3":
            values["rope_scaling"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        assert parse(values).model.rope_scaling == "llama3"
        assert not parse(values).model.rope_is_stretched


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mistral", {"layer_types": [SLIDING, FULL]}, f"layer_types=['{SLIDING}', '{FULL}'] is"),
        ("mistral", {"layer_types": [FULL, FULL]}, "does not fit sliding_window=16"),
        ("mistral", {"layer_types": [SLIDING]}, "the same attention 2 times"),
        ("mistral", {"layer_types": SLIDING}, "layer_types must be of type list"),
        ("mistral", {"layer_types": [[], []]}, "is not supported"),
        ("mistral", {"layer_types": ["chunked_attention"] * 2}, "is not supported"),
        ("mistral", {"use_sliding_window": False}, "does not fit sliding_window=16"),
        ("mistral", {"max_window_layers": 1}, "not supported with sliding_window"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be positive"),
        ("mistral", {"sliding_window": True}, "sliding_window must be of type int"),
        (
            "llama",
            {"layer_types": [SLIDING, SLIDING]},
            "does not fit a model without a sliding window",
        ),
    ],
)
def test_windows_of_some_layers(name, changes, message):
    assert message in error_of({**written(name), **changes})


def test_windows_of_all_layers():
    values = written("mistral")
    assert parse({**values, "layer_types": [SLIDING, SLIDING]}).model.sliding_window == 16
    full = {**values, "layer_types": [FULL, FULL], "sliding_window": None}
    assert parse(full).model.sliding_window == 0


FIELDS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), int),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), int),
    **dict.fromkeys(("max_position_embeddings", "max_sequence_length"), int),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), float),
    "tie_word_embeddings": bool,
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_the_wrong_type_is_named(field):
    values = written()
    del values["rope_parameters"]
    wrong = [value for value in ("4", [4], {"a": 4}, 0.5, True) if type(value) is not FIELDS[field]]
    wrong += [] if FIELDS[field] is bool else [-1, 0]
    wrong += [2**31, 10**30] if FIELDS[field] is int else []
    wrong += [float("nan"), float("inf"), 10**30] if FIELDS[field] is float else []
    for value in wrong:
        message = error_of({**values, field: value})
        assert message.startswith(f"config.json: {field} must be "), (value, message)
        assert message.count("config.json") == 1


def test_what_does_not_fit_is_named_as_in_the_file():
    head_dim = {"head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 1}
    for changes, message in (
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_"),
        (head_dim, "hidden_size=32 is not a multiple of num_attention_heads=3"),
        ({"head_dim": 7}, "RoPE needs an even head size, got 7"),
    ):
        assert error_of({**written(), **changes}).startswith(f"config.json: {message}")


def rope(**values):
    plain = written()
    del plain["rope_parameters"], plain["rope_theta"]
    return {**plain, "rope_scaling": values}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (rope(type="linear"), "config.json does not have 'rope_scaling.factor'"),
        (rope(type="linear", factor="4"), "rope_scaling.factor must be of type float, got '4'"),
        (rope(type="linear", factor=0), "rope_scaling.factor must be positive"),
        (rope(type="dynamic", factor=0.5), "the factor of RoPE must be at least 1, got 0.5"),
        (rope(type="yarn", factor=None), "rope_scaling.factor must be of type float, got null"),
        (
            rope(type="yarn", factor=4.0, original_max_position_embeddings=0),
            "rope_scaling.original_max_position_embeddings must be positive",
        ),
        (rope(type="yarn", factor=4.0, attention_factor=0), "attention_factor must be positive"),
        (rope(type="yarn", factor=4.0, truncate="no"), "truncate must be of type bool"),
        (rope(type="yarn", factor=4.0, beta_fast=0.5), "beta_slow must be positive and less than"),
        (rope(type="llama3", factor=8.0), "does not have 'rope_scaling.low_freq_factor'"),
        (rope(type="longrope", factor=4.0), "RoPE of type 'longrope' is not supported; known: def"),
        (rope(rope_type="su"), "RoPE of type 'su' is not supported"),
        (rope(rope_type=3), "rope_scaling.rope_type must be of type str"),
        (rope(rope_type="linear", type="dynamic", factor=4.0), "rope_type and type disagree"),
        (rope(factor=4.0), "rope_scaling.factor=4.0 is not supported"),
        (rope(type="linear", factor=4.0, beta_fast=8), "rope_scaling.beta_fast is unknown"),
        (
            rope(type="dynamic", factor=4.0, original_max_position_embeddings=9),
            "rope_scaling.original_max_position_embeddings=9 is not supported",
        ),
        (rope(type="default", partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not"),
        ({**written(), "rope_scaling": 4}, "rope_scaling must be an object"),
        ({**written(), "rope_parameters": ["linear"]}, "rope_parameters must be an object"),
        (
            {**written("yarn"), "rope_scaling": {**written("yarn")["rope_scaling"], "factor": 2.0}},
            "rope_scaling and rope_parameters disagree on factor",
        ),
        (
            {**written("yarn"), "original_max_position_embeddings": 31},
            "original_max_position_embeddings disagree",
        ),
    ],
)
def test_rope_that_cannot_be(values, message):
    assert message in error_of(values) and error_of(values).count("config.json") == 1


def test_rope_of_released_models():
    """Values from the files of Vicuna 16k, LongChat, deepseek-coder and YaRN-Llama-2."""
    vicuna = {**rope(factor=4.0, type="linear"), "max_position_embeddings": 4096}
    config = parse({**vicuna, "max_sequence_length": 16384})
    assert (config.model.rope_scaling, config.model.rope_scaling_factor) == ("linear", 4)
    assert config.train.seq_len == 16384
    coder = {**rope(factor=4.0, type="linear"), "max_position_embeddings": 16384}
    config = parse({**coder, "rope_theta": 100000})
    assert (config.model.rope_theta, config.train.seq_len) == (1e5, 16384)
    yarn = {"factor": 32.0, "original_max_position_embeddings": 4096, "finetuned": True}
    config = parse({**rope(type="yarn", **yarn), "max_position_embeddings": 131072})
    assert (config.model.rope_scaling_factor, config.model.rope_original_context) == (32, 4096)
    implied = {"factor": None, "original_max_position_embeddings": 4096}
    assert config == parse({**rope(type="yarn", **implied), "max_position_embeddings": 131072})
    config = parse({**rope(type="yarn", factor=4.0), "max_position_embeddings": 4096})
    assert (config.model.rope_original_context, config.train.seq_len) == (4096, 16384)
    config = parse({**rope(type="dynamic", factor=2.0), "max_position_embeddings": 4096})
    assert (config.model.rope_original_context, config.train.seq_len) == (4096, 8192)


def test_sizes_beyond_the_tensors_are_told_at_once(tmp_path):
    folder = exported(tmp_path / "hf", GROUPED)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for changes, message in (
        ({"num_hidden_layers": 2**31 - 1}, "has 21 tensors, too few for the 2147483647 layers"),
        ({"hidden_size": 2**30, "head_dim": None}, "has shape (64, 32), config.json requires"),
        ({"vocab_size": 2**31 - 1}, "config.json requires (2147483647, 32)"),
        ({"num_attention_heads": 2**30, "head_dim": 2**30}, "config.json requires"),
    ):
        path.write_text(json.dumps({**values, **changes}))
        with pytest.raises(UserError) as caught:
            HfSource(folder)
        assert message in str(caught.value) and "\n" not in str(caught.value)


# The matrices determine the dtype.


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"norm": "float32"}, "bfloat16"),
        ({"inv_freq": "float32"}, "bfloat16"),
        ({"norm": "float16", "inv_freq": "float32"}, "bfloat16"),
        ({"lm_head": "float32"}, "float32"),
        ({"q_proj": "float16"}, "float32"),
        ({"norm": "bfloat16", "": "float16"}, "float16"),
        ({"norm": "float16", "": "float32"}, "float32"),
    ],
)
def test_the_dtype_is_that_of_the_matrices(tmp_path, kinds, expected):
    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    folder = exported(tmp_path / "hf", GROUPED)
    tensors = load_file(folder / "model.safetensors")
    size = sum(tensor.size for tensor in tensors.values())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    dtypes = {"": "bfloat16", **kinds}
    for name, tensor in tensors.items():
        named = [dtype for part, dtype in dtypes.items() if part and part in name]
        kind = named[0] if named else dtypes[""]
        tensors[name] = tensor.astype(getattr(ml_dtypes, kind, None) or kind)
    save_file(tensors, folder / "model.safetensors")

    from llama_jax.interchange.opening import open_source
    from llama_jax.interchange.transfer import convert

    source = HfSource(folder)
    assert source.description.dtype == expected
    compute = "float32" if expected == "float32" else "bfloat16"
    assert source.description.config.model.compute_dtype == compute
    convert(source, "hf", tmp_path / "again", "")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in again.values()} == {expected}
    assert sum(tensor.size for tensor in again.values()) == size
    assert open_source("hf", tmp_path / "again").description.dtype == expected
