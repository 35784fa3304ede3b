"""Import and export of weights agree with transformers and torch (`make parity`)."""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.interchange import formats
from llama_jax.interchange import meta as meta_lib
from llama_jax.interchange.hf import HfSource
from llama_jax.interchange.meta import MetaSource, half_split, interleaved
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.transfer import convert
from llama_jax.model.cost import parameter_count
from llama_jax.model.llama import logits
from llama_jax.train.step import abstract_state
from tests.helpers import random_params, replace, run_command
from tests.interchange.test_transfer import CONTEXT, FAMILY, GROUPED, Memory, assert_same

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
}


def scaled(factor, **changes):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_parameters": {**rope, "original_max_position_embeddings": 64, **changes}}


def stretched(kind, factor=4.0, context=CONTEXT, theta=1e4, **changes):
    """Returns fields of a model with stretched RoPE, by default to the context of the tests."""
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor, **changes}
    return {"rope_parameters": rope, "max_position_embeddings": context}


ORIGINAL = {"original_max_position_embeddings": 128}
THREE_HEADS = {"num_attention_heads": 3, "num_key_value_heads": 1}
MODELS = {
    "llama": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "llama2": {},
    "codellama": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama3.1": scaled(8.0),
    "llama3.2": {**scaled(32.0), "tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "mistral without window": {"sliding_window": None, "head_dim": 16},
    "linear": stretched("linear", theta=1e5),
    "dynamic": stretched("dynamic", context=128),
    "dynamic within": stretched("dynamic", 2.0),  # stays within the original context
    "dynamic by length": stretched("dynamic", 1.0, context=100),
    "yarn": stretched("yarn", **ORIGINAL),
    "yarn with scales": stretched("yarn", mscale=0.8, mscale_all_dim=0.3, **ORIGINAL),
    "yarn with all": stretched(
        *("yarn", 3.5, 100),  # no field has the original context
        beta_fast=20,
        beta_slow=2.5,
        attention_factor=1.4,
        truncate=False,
    ),
    "mistral linear": {**stretched("linear", 2.0), "sliding_window": 16},
    "mistral dynamic": {**stretched("dynamic", 2.0, context=128), "sliding_window": 200},
    "mistral yarn": {**stretched("yarn", **ORIGINAL), "sliding_window": None, "head_dim": 16},
    "odd heads": {**THREE_HEADS, "hidden_size": 36, "head_dim": 10},
    "odd kv heads": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36},
}


def make(name, folder):
    """Saves and returns a random model of transformers, with logits of about 5.

    With larger weights, attention is so sharp that float32 rounding moves the logits by 1e-4.
    """
    import torch
    import transformers

    kind = "Mistral" if name.startswith("mistral") else "Llama"
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **MODELS[name]})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else 0.2 * noise)
    model.save_pretrained(folder)
    return model


def expected_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens).long()).logits.numpy()


def tokens_of(vocab_size):
    return np.random.default_rng(1).integers(0, vocab_size, (2, CONTEXT), dtype=np.int32)


def our_params(source):
    """Returns the config and the weights of a source in float32."""
    description = source.description
    config = replace(description.config, model__compute_dtype="float32").model
    leaves, tree = jax.tree.flatten_with_path(abstract_state(description.config).params)
    arrays = []
    for keys, leaf in leaves:
        path = "/".join(key.key for key in keys)
        if path.startswith("layers/"):
            parts = [source.read(path, layer) for layer in range(leaf.shape[0])]
            arrays.append(np.stack(parts).astype(np.float32))
        else:
            arrays.append(source.read(path, None).astype(np.float32))
    return config, jax.tree.unflatten(tree, arrays)


def our_logits(source, tokens):
    return logits(*our_params(source), tokens)


def load_quietly(folder):
    """Loads a model with transformers; any warning, log line or loading problem is an error."""
    import torch
    import transformers

    lines = []
    handler = type("Handler", (__import__("logging").Handler,), {})()
    handler.emit = lambda record: lines.append(record.getMessage())
    transformers.utils.logging.add_handler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, output_loading_info=True
            )
    finally:
        transformers.utils.logging.remove_handler(handler)
    assert lines == []
    assert not any(info.values()), info
    assert isinstance(model, torch.nn.Module)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out(name, tmp_path):
    import torch

    model = make(name, tmp_path / "theirs")
    tokens = tokens_of(model.config.vocab_size)
    source = HfSource(tmp_path / "theirs")
    expected = expected_logits(model, tokens)
    assert 3 < np.abs(expected).max() < 60
    # All positions of the context, beyond the window and up to the end.
    np.testing.assert_allclose(our_logits(source, tokens), expected, rtol=0, atol=5e-5)

    convert(source, "ckpt", tmp_path / "run")
    convert(open_source("ckpt", tmp_path / "run"), "hf", tmp_path / "ours")
    again = load_quietly(tmp_path / "ours")
    state = again.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    np.testing.assert_array_equal(expected_logits(again, tokens), expected)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation(name, tmp_path):
    """Prompts of unequal lengths, 64 new tokens beyond the window; then two end tokens."""
    from llama_jax.inference.decode import Sampling, generate
    from tests.reference import hf_reference

    model = make(name, tmp_path / "theirs")
    config, params = our_params(HfSource(tmp_path / "theirs"))
    prompts = [[1, 5, 9], [1, *range(20, 50)], [1]]

    def ours(ends):
        sampling = Sampling(max_tokens=64, temperature=0.0)
        return generate(config, params, prompts, sampling, context=CONTEXT, eos_id=ends)

    expected = hf_reference.greedy(model, prompts)
    assert ours(10_000) == expected and len({tuple(row) for row in expected}) == 3
    ends = [expected[0][9], expected[1][5]]
    theirs = hf_reference.greedy(model, prompts, ends)
    for got, want in zip(ours(ends), theirs, strict=True):
        assert got == want[: len(got)] and (len(got) == 64 or got[-1] in ends)
        assert not any(want[len(got) :])


@pytest.mark.parametrize("window", [None, 70])
def test_greedy_generation_beyond_the_original_context(tmp_path, monkeypatch, window):
    """With dynamic RoPE, each cached key keeps the theta of the step that computed it."""
    from llama_jax.inference import decode
    from tests.reference import hf_reference

    monkeypatch.setattr(decode, "PREFILL", 16)  # longer prompts take several pieces
    name = "mistral dynamic" if window else "dynamic"
    monkeypatch.setitem(SIZES, "max_position_embeddings", 40)
    dynamic = stretched("dynamic", context=40)
    monkeypatch.setitem(MODELS, name, {**dynamic, "sliding_window": window} if window else dynamic)
    make(name, tmp_path / "theirs")
    config, params = our_params(HfSource(tmp_path / "theirs"))
    short, long = list(range(1, 20)), np.random.default_rng(2).integers(1, 96, 75).tolist()
    sampling = decode.Sampling(max_tokens=64, temperature=0.0)
    found = decode.generate(config, params, [short, long], sampling, context=160, eos_id=10_000)
    for prompt, ours in zip((short, long), found, strict=True):
        # Transformers uses the longest row for the whole batch, and keeps that state in the model.
        model = make(name, tmp_path / "again")
        assert [ours] == hf_reference.greedy(model, [prompt])
        plain = dataclasses.replace(config, rope_original_context=10_000)
        assert [ours] != decode.generate(
            plain, params, [prompt], sampling, context=160, eos_id=10_000
        )


SLIDING, FULL = "sliding_attention", "full_attention"
HARMLESS = {
    **{"pretraining_tp": 2, "attention_dropout": 0.3, "initializer_range": 0.5, "use_cache": False},
    **{"layer_types": [FULL] * 3, "unsloth_version": "2025.1", "is_decoder": True, "prefix": "x"},
    **{"hidden_act": "swish", "attention_multiplier": None, "use_sliding_window": False},
    **{"repetition_penalty": 1.5, "temperature": 0.1, "num_beams": 4, "pad_token_id": 3},
    **{"chunk_size_feed_forward": 1, "torchscript": True, "max_sequence_length": 4096},
    **{"torch_dtype": "float32", "return_dict": True, "id2label": {"0": "a"}, "bos_token_id": 7},
    **{"tie_last_hidden_states": False, "max_window_layers": 1, "sliding_window": None},
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama2", HARMLESS),
        ("mistral", {"layer_types": [SLIDING] * 3}),
        ("mistral", {"use_sliding_window": True, "hidden_act": "swish"}),
    ],
)
def test_fields_that_change_no_logits(name, changes, tmp_path):
    import transformers

    expected = expected_logits(make(name, tmp_path), tokens := tokens_of(96))
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(expected_logits(again, tokens), expected, rtol=0, atol=5e-5)
    np.testing.assert_allclose(our_logits(HfSource(tmp_path), tokens), expected, atol=5e-5)


def test_every_field_that_transformers_writes_is_known(tmp_path):
    import transformers

    make("llama2", tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    whole = transformers.LlamaConfig(**values).to_dict()
    generation = transformers.GenerationConfig(do_sample=True, top_k=5, max_length=99).to_dict()
    path.write_text(json.dumps({**generation, **whole, "dtype": "float32"}))
    assert HfSource(tmp_path).description.config.model.dim == 32


@pytest.mark.parametrize(
    "old",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e5},
        {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": None, **ORIGINAL}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0, "mscale": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 1.5}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, **ORIGINAL},
        {"rope_scaling": {"type": "default"}, "rope_theta": 2e4, "partial_rotary_factor": 1.0},
    ],
)
@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_rope_as_version_4_writes_it(name, old, tmp_path):
    import transformers

    make(name, tmp_path)
    path = tmp_path / "config.json"
    values = {**json.loads(path.read_text()), "max_position_embeddings": 256, **old}
    del values["rope_parameters"]
    path.write_text(json.dumps(values))
    tokens = tokens_of(96)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    source = HfSource(tmp_path)
    expected = expected_logits(theirs, tokens)
    np.testing.assert_allclose(our_logits(source, tokens), expected, rtol=0, atol=5e-5)
    convert(source, "hf", tmp_path / "ours")
    np.testing.assert_array_equal(
        expected_logits(load_quietly(tmp_path / "ours"), tokens), expected
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_load_as_such(tmp_path, dtype):
    import torch

    convert(Memory(GROUPED, random_params(GROUPED.model)), "hf", tmp_path / "hf", dtype)
    assert load_quietly(tmp_path / "hf").dtype == getattr(torch, dtype)


def test_our_tokenizer_loads(tmp_path, tokenizer, corpus):
    import transformers

    config = replace(GROUPED, model__vocab_size=300)
    source = Memory(config, random_params(config.model))
    source.description.files["tokenizer.model"] = tokenizer.model_bytes
    convert(source, "hf", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = ["abc de f", "# file 3\nabc  de\n", " x", "   two  of   them ", "é☃ 12\t\r\n", "🙂", ""]
    texts += [path.read_text() for path in corpus.iterdir()]
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == [tokenizer.bos_id, *ids], text
        assert theirs.decode(ids) == text
    assert load_quietly(tmp_path / "hf").generation_config.eos_token_id == tokenizer.eos_id


def test_a_long_context_of_scaled_rope(tmp_path):
    """Positions near the end of a context of 8192 have large angles."""
    import torch

    from llama_jax.model.llama import forward

    model = make("llama3.1", tmp_path / "theirs")
    source = HfSource(tmp_path / "theirs")
    config = replace(source.description.config, model__compute_dtype="float32")
    positions = np.arange(8192 - 64, 8192, dtype=np.int32)[None]
    tokens = tokens_of(96)[:1, :64]
    with torch.no_grad():
        expected = model(
            input_ids=torch.from_numpy(tokens).long(),
            position_ids=torch.from_numpy(positions).long(),
        ).logits.numpy()
    params = {}
    convert(source, "ckpt", tmp_path / "run")
    from llama_jax.checkpoint.saved_step import find_step, load_params
    from llama_jax.parallel.sharding import param_shardings, with_shardings
    from tests.helpers import mesh_of

    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        shapes = abstract_state(config).params
        shardings = param_shardings(shapes, mesh)
        params = load_params(find_step(tmp_path / "run"), with_shardings(shapes, shardings))
        hidden, head, _ = forward(config.model, params, tokens, positions_BT=positions)
    np.testing.assert_allclose(hidden @ head, expected, rtol=0, atol=5e-5)


# Meta's layout.


def reference_meta(model, params, tokens):
    """Computes LLaMA's logits like Meta: interleaved pairs as complex numbers, in float64."""
    heads, head_dim = params["n_heads"], params["dim"] // params["n_heads"]
    kv_heads = params["n_kv_heads"]
    w = {name: tensor.double().numpy() for name, tensor in model.items()}

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + params["norm_eps"]) * scale

    length = tokens.shape[1]
    frequency = params["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    turn = np.exp(1j * np.arange(length)[:, None] * frequency)[None, :, None]

    def rotate(x):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        out = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([out.real, out.imag], -1).reshape(x.shape)

    x = w["tok_embeddings.weight"][tokens]
    mask = np.triu(np.full((length, length), -np.inf), 1)
    for i in range(params["n_layers"]):
        h = norm(x, w[f"layers.{i}.attention_norm.weight"])
        q, k, v = (
            (h @ w[f"layers.{i}.attention.{n}.weight"].T).reshape(*h.shape[:2], count, head_dim)
            for n, count in (("wq", heads), ("wk", kv_heads), ("wv", kv_heads))
        )
        q, k = rotate(q), np.repeat(rotate(k), heads // kv_heads, 2)
        v = np.repeat(v, heads // kv_heads, 2)
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / head_dim**0.5 + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        out = np.einsum("bhqk,bkhd->bqhd", scores, v).reshape(*h.shape[:2], -1)
        x = x + out @ w[f"layers.{i}.attention.wo.weight"].T
        h = norm(x, w[f"layers.{i}.ffn_norm.weight"])
        gate, up = (h @ w[f"layers.{i}.feed_forward.{n}.weight"].T for n in ("w1", "w3"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"layers.{i}.feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


META = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 64}
META |= {"multiple_of": 16, "norm_eps": 1e-5, "rope_theta": 10_000.0}


def meta_state(seed=0):
    import torch

    torch.manual_seed(seed)
    dim, ffn = 32, 48
    shapes = {"tok_embeddings.weight": (64, dim), "output.weight": (64, dim), "norm.weight": (dim,)}
    for i in range(2):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (32, dim),
            f"layers.{i}.attention.wk.weight": (16, dim),
            f"layers.{i}.attention.wv.weight": (16, dim),
            f"layers.{i}.attention.wo.weight": (dim, 32),
            f"layers.{i}.feed_forward.w1.weight": (ffn, dim),
            f"layers.{i}.feed_forward.w2.weight": (dim, ffn),
            f"layers.{i}.feed_forward.w3.weight": (ffn, dim),
            f"layers.{i}.attention_norm.weight": (dim,),
            f"layers.{i}.ffn_norm.weight": (dim,),
        }
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape)
        state[name] = 1 + 0.2 * noise if len(shape) == 1 else 0.3 * noise
    return state


def save_meta(folder, state, pieces=1, embed_axis=1, **changes):
    """Saves the weights as Meta does, in `pieces` tensor-parallel files."""
    import torch

    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({**META, **changes}))
    for piece in range(pieces):
        part = {"rope.freqs": torch.ones(4)}
        for name, tensor in state.items():
            axis = 0
            if "wo" in name or "w2" in name:
                axis = 1
            if "tok_embeddings" in name:
                axis = embed_axis
            whole = tensor.ndim == 1
            part[name] = tensor if whole else tensor.chunk(pieces, axis)[piece].clone()
        torch.save(part, folder / f"consolidated.{piece:02d}.pth")
    return folder


@pytest.mark.parametrize(("pieces", "embed_axis"), [(1, 1), (2, 1), (2, 0)])
def test_meta_computes_what_we_and_transformers_compute(tmp_path, pieces, embed_axis):
    state = meta_state()
    folder = save_meta(tmp_path / "meta", state, pieces, embed_axis, vocab_size=-1)
    tokens = tokens_of(64)[:, :48]
    expected = reference_meta(state, META, tokens)
    assert np.abs(expected).max() > 3
    source = MetaSource(folder)
    np.testing.assert_allclose(our_logits(source, tokens), expected, rtol=0, atol=5e-5)
    convert(source, "hf", tmp_path / "hf")
    theirs = expected_logits(load_quietly(tmp_path / "hf"), tokens)
    np.testing.assert_allclose(theirs, expected, rtol=0, atol=5e-5)


def test_more_pieces_than_kv_heads(tmp_path):
    import torch

    state = meta_state()
    whole = MetaSource(save_meta(tmp_path / "1", state))
    folder = save_meta(tmp_path / "4", state, 4, 0)  # each piece has half a head
    source = MetaSource(folder)
    assert source.description.config == whole.description.config
    for unit in formats.paths_and_layers(whole.description.config.model):
        np.testing.assert_array_equal(source.read(*unit), whole.read(*unit), str(unit))
    for piece in range(4):  # each piece has a copy of a head
        path = folder / f"consolidated.{piece:02d}.pth"
        heads = {n: t.chunk(2)[piece // 2].clone() for n, t in state.items() if ".wk." in n}
        torch.save(torch.load(path) | heads, path)
    name = "layers.0.attention.wk.weight"
    with pytest.raises(UserError, match=rf"{name} has shape .*, params.json requires"):
        MetaSource(folder)


def test_a_wrong_permutation_shows(tmp_path, monkeypatch):
    folder = save_meta(tmp_path / "meta", meta_state())
    tokens = tokens_of(64)[:, :48]
    expected = reference_meta(meta_state(), META, tokens)
    for wrong in (lambda rows, head_dim: rows, interleaved):
        monkeypatch.setattr(meta_lib, "half_split", wrong)
        assert np.abs(our_logits(MetaSource(folder), tokens) - expected).max() > 0.1


def test_the_permutations_are_inverse():
    rows = np.arange(48 * 3).reshape(48, 3)
    assert not np.array_equal(half_split(rows, 12), interleaved(rows, 12))
    np.testing.assert_array_equal(interleaved(half_split(rows, 12), 12), rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", FAMILY)
def test_to_meta_and_back(name, dtype, tmp_path):
    config, params = FAMILY[name], random_params(FAMILY[name].model)
    convert(Memory(config, params), "meta", tmp_path / "meta", dtype)
    assert sorted(path.name for path in (tmp_path / "meta").iterdir()) == [
        "consolidated.00.pth",
        "params.json",
    ]
    source = MetaSource(tmp_path / "meta")
    kind = {"bfloat16": __import__("ml_dtypes").bfloat16, "float32": np.float32}[dtype]
    assert source.description.dtype == dtype
    assert source.description.config.model == replace(config, model__compute_dtype=dtype).model
    assert source.description.config.train.seq_len == CONTEXT
    assert_same(source, jax.tree.map(lambda leaf: leaf.astype(kind), params))


def test_meta_to_ours_and_back_is_the_same_file(tmp_path):
    import torch

    state = {name: tensor.bfloat16() for name, tensor in meta_state().items()}
    convert(MetaSource(save_meta(tmp_path / "meta", state, 2)), "ckpt", tmp_path / "run")
    convert(open_source("ckpt", tmp_path / "run"), "meta", tmp_path / "again", "bfloat16")
    again = torch.load(tmp_path / "again" / "consolidated.00.pth", weights_only=True)
    assert set(again) == set(state)
    for name, tensor in state.items():
        assert again[name].dtype == torch.bfloat16 and torch.equal(tensor, again[name]), name


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ({"norm": "float32"}, "bfloat16"),
        ({"norm": "bfloat16", "": "float16"}, "float16"),
        ({"norm": "bfloat16", "": "float32"}, "float32"),
        ({"wq": "float32"}, "float32"),
        ({"w1": "float16"}, "float32"),
    ],
)
def test_the_dtype_is_that_of_the_matrices(tmp_path, kinds, expected):
    import torch

    kinds = {"": "bfloat16", **kinds}
    state = {}
    for name, tensor in meta_state().items():
        named = [kind for part, kind in kinds.items() if part and part in name]
        state[name] = tensor.to(getattr(torch, named[0] if named else kinds[""]))
    source = MetaSource(save_meta(tmp_path / "meta", state, 2))
    assert source.description.dtype == expected
    convert(source, "meta", tmp_path / "again")
    again = torch.load(tmp_path / "again" / "consolidated.00.pth", weights_only=True)
    assert {tensor.dtype for tensor in again.values()} == {getattr(torch, expected)}


def test_what_params_json_leaves_open(tmp_path):
    state = meta_state()
    plain = MetaSource(save_meta(tmp_path / "1", state)).description.config
    assert (plain.train.seq_len, plain.model.tied_embeddings) == (2048, False)
    given = MetaSource(tmp_path / "1", context=4096).description.config
    assert given.train.seq_len == 4096
    scaled = MetaSource(save_meta(tmp_path / "2", state, use_scaled_rope=True)).description.config
    assert (scaled.model.rope_scaling_factor, scaled.train.seq_len) == (8, 131_072)
    state["output.weight"] = state["tok_embeddings.weight"]
    tied = MetaSource(save_meta(tmp_path / "3", state, use_scaled_rope=True)).description.config
    assert (tied.model.rope_scaling_factor, tied.model.tied_embeddings) == (32, True)


def bad_pickle(folder):
    import pickle

    (folder / "consolidated.00.pth").write_bytes(pickle.dumps({"a": pytest}.keys().__class__))


class Malice:
    def __reduce__(self):
        return (print, ("this must not be printed",))


def malicious(folder):
    import torch

    torch.save({"tok_embeddings.weight": Malice()}, folder / "consolidated.00.pth")


def not_named(folder):
    import torch

    torch.save([torch.ones(3)], folder / "consolidated.00.pth")


def cut(folder):
    path = folder / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:5000])


def drop(name, piece=0):
    def change(folder):
        import torch

        path = folder / f"consolidated.{piece:02d}.pth"
        state = torch.load(path)
        del state[name]
        torch.save(state, path)

    return change


def params_of(**changes):
    def change(folder):
        path = folder / "params.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


DAMAGE = {
    "no piece": (lambda f: [p.unlink() for p in f.glob("*.pth")], "has no consolidated.00.pth"),
    "a piece": (lambda f: (f / "consolidated.00.pth").unlink(), "pieces are missing"),
    "params": (lambda f: (f / "params.json").unlink(), "has no params.json"),
    "JSON": (lambda f: (f / "params.json").write_text("{"), "is not valid JSON"),
    "truncated": (cut, "is not a file of weights, or damaged"),
    "code": (malicious, "is not a file of weights, or damaged"),
    "text": (lambda f: (f / "consolidated.00.pth").write_text("hi"), "is not a file of weights"),
    "list": (not_named, "it holds no named tensors"),
    "tensor of one": (
        drop("norm.weight", 1),
        "does not have the same tensors as consolidated.00.pth",
    ),
    "layers": (params_of(n_layers=3), "lacks layers.2.attention.wk.weight"),
    "fewer layers": (params_of(n_layers=1), "unknown to params.json"),
    "dim": (params_of(dim=64), "has shape"),
    "heads": (params_of(n_kv_heads=4), "wk.weight has shape (16, 32), params.json requires"),
    "vocabulary": (params_of(vocab_size=65), "vocab_size=65, but the embedding has 64 rows"),
    "eps": (params_of(norm_eps="small"), "params.json: "),
    "moe": (params_of(moe={"num_experts": 8}), "moe={'num_experts': 8} is not supported"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_in_one_line(tmp_path, kind, capfd):
    damage, message = DAMAGE[kind]
    folder = save_meta(tmp_path / "meta", meta_state(), 2)
    damage(folder)
    with pytest.raises(UserError) as caught:
        MetaSource(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "must not be printed" not in capfd.readouterr().out


def test_the_command(tmp_path, tokenizer):
    """`convert` imports a Hugging Face folder, and `generate` continues a prompt with it."""
    config = replace(GROUPED, model__vocab_size=300, train__seq_len=64)
    source = Memory(config, random_params(config.model))
    source.description.files["tokenizer.model"] = tokenizer.model_bytes
    convert(source, "hf", tmp_path / "hf", "bfloat16")
    places = (f"--source=hf:{tmp_path}/hf", f"--target=ckpt:{tmp_path}/run")
    process = run_command("convert", *places)
    assert process.returncode == 0 and process.stderr == ""
    assert f"wrote {tmp_path}/run: {parameter_count(config.model):,} parameters" in process.stdout
    generated = run_command("generate", f"--checkpoint={tmp_path}/run", "--prompt=abc")
    assert generated.returncode == 0 and generated.stdout.startswith("abc"), generated.stderr
