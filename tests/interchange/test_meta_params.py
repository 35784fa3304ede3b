"""Accepted values of `params.json`; these tests need no tensors."""

import json

import pytest
from etils import epath

from llama_jax.errors import UserError
from llama_jax.interchange import meta_params
from tests.helpers import replace
from tests.interchange.test_transfer import CONTEXT, FAMILY

# As Meta released them: Llama 2 7B, Llama 3.1 8B, Llama 3.2 1B.
LLAMA2 = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05}
LLAMA2 |= {"vocab_size": -1}
LLAMA31 = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}
LLAMA31 |= {"ffn_dim_multiplier": 1.3, "multiple_of": 1024, "norm_eps": 1e-05}
LLAMA31 |= {"rope_theta": 500000.0, "use_scaled_rope": True}


def read(tmp_path, values, vocab_size=128256, tied=False):
    path = epath.Path(tmp_path / "params.json")
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return meta_params.model_of(meta_params.read(path), vocab_size, 11008, tied)


def test_released_ones(tmp_path):
    model = read(tmp_path, LLAMA2, 32000)
    assert (model.vocab_size, model.n_kv_heads, model.rope_is_stretched) == (32000, 32, False)
    model = read(tmp_path, LLAMA31)
    assert (model.rope_scaling, model.rope_scaling_factor) == ("llama3", 8)
    assert read(tmp_path, LLAMA31, tied=True).rope_scaling_factor == 32


@pytest.mark.parametrize("name", FAMILY)
def test_what_we_write_is_read(tmp_path, name):
    config = FAMILY[name]
    text = meta_params.to_json(config)
    model = read(tmp_path, text, config.model.vocab_size, config.model.tied_embeddings)
    expected = replace(config, model__compute_dtype="bfloat16", model__ffn_dim=11008).model
    assert model == expected
    assert json.loads(text)["max_seq_len"] == CONTEXT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "4096"}, "dim must be of type int, got '4096'"),
        ({"dim": None}, "dim must be of type int, got null"),
        ({"n_layers": 2**31}, "n_layers must be positive and less than 2**31"),
        ({"n_layers": 32.0}, "n_layers must be of type int, got 32.0"),
        ({"n_kv_heads": 3}, "n_heads=32 is not a multiple of n_kv_heads=3"),
        ({"head_dim": -2}, "head_dim must be positive"),
        ({"head_dim": 3}, "RoPE needs an even head size"),
        ({"norm_eps": "small"}, "norm_eps must be of type float, got 'small'"),
        ({"norm_eps": 0}, "norm_eps must be positive"),
        ({"vocab_size": 7}, "vocab_size=7, but the embedding has 128256 rows"),
        ({"vocab_size": None}, "vocab_size must be of type int, got null"),
        ({"sliding_window": -1}, "sliding_window must be 0 or more"),
        ({"rope_theta": 0}, "rope_theta must be positive"),
        ({"use_scaled_rope": 1}, "use_scaled_rope must be of type bool"),
        ({"rope_scaling": "ntk"}, "rope_scaling='ntk' is not supported; known: llama3, linear"),
        ({"rope_scaling_factor": 0.5}, "rope_scaling_factor must be at least 1"),
        ({"rope_scaling": "yarn", "rope_original_context": 8.5}, "must be of type int, got 8.5"),
        ({"rope_scaling": "yarn", "rope_truncate": 1}, "rope_truncate must be of type bool"),
        ({"moe": {"num_experts": 8}}, "moe={'num_experts': 8} is not supported"),
        ({"use_qk_norm": True}, "use_qk_norm=True is not supported"),
        ({"nope_layer_interval": 4}, "nope_layer_interval=4 is not supported"),
        ({"yarn": {"factor": 4}}, "yarn is unknown and may change what the model computes"),
    ],
)
def test_a_field_that_cannot_be(tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        read(tmp_path, {**LLAMA31, **changes})
    assert message in str(caught.value) and str(caught.value).count("params.json") == 1


def test_a_file_that_is_none(tmp_path):
    for text, message in (("[]", "is not a JSON object"), ("{", "is not valid JSON")):
        with pytest.raises(UserError, match=message):
            read(tmp_path, text)
    with pytest.raises(UserError, match="does not have 'n_heads'"):
        read(tmp_path, {"dim": 32})
