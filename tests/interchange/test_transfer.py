"""Import and export keep every bit, and report bad input in one line."""

import dataclasses
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from benchmarks import convert as benchmark
from llama_jax.checkpoint import saved_step
from llama_jax.errors import UserError
from llama_jax.interchange import formats, hf_config, safetensors
from llama_jax.interchange.hf import HfSource, HfTarget
from llama_jax.interchange.loading import load_hf
from llama_jax.interchange.opening import open_source, parse_place
from llama_jax.interchange.transfer import convert
from llama_jax.model.cost import flops_per_token, parameter_count
from llama_jax.parallel.sharding import param_shardings, with_shardings
from llama_jax.train.step import abstract_state
from tests.helpers import TINY, mesh_of, random_params, replace, shared_step

GROUPED = replace(TINY, model__n_kv_heads=2)


def shaped(**changes):
    return dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, **changes))


FAMILY = {
    "llama": TINY,
    "llama2": replace(GROUPED, model__norm_eps=1e-5),
    "codellama": replace(GROUPED, model__rope_theta=1e6, model__norm_eps=1e-5),
    "llama3.1": replace(
        GROUPED,
        model__rope_theta=5e5,
        model__rope_scaling_factor=8.0,
        model__rope_original_context=32,
        model__explicit_head_dim=16,
    ),
    "llama3.2": replace(
        GROUPED,
        model__tied_embeddings=True,
        model__rope_theta=5e5,
        model__rope_scaling_factor=32.0,
        model__rope_original_context=32,
        model__rope_low_freq_factor=2.0,
    ),
    "mistral": replace(GROUPED, model__sliding_window=16, model__norm_eps=1e-5),
    "linear": replace(GROUPED, model__rope_scaling="linear", model__rope_scaling_factor=4.0),
    "dynamic": replace(
        GROUPED,
        model__rope_scaling="dynamic",
        model__rope_scaling_factor=4.0,
        model__rope_original_context=128,
    ),
    "yarn": replace(
        GROUPED,
        model__rope_scaling="yarn",
        model__rope_scaling_factor=16.0,
        model__rope_original_context=32,
        model__rope_beta_fast=20.0,
        model__rope_beta_slow=2.0,
        model__rope_truncate=False,
        model__rope_attention_factor=1.25,
        model__sliding_window=200,
    ),
    "odd heads": shaped(n_heads=3, n_kv_heads=1, explicit_head_dim=10),
    "odd kv heads": shaped(dim=36, n_heads=9, n_kv_heads=3),
}
CONTEXT = 512
FAMILY = {name: replace(config, train__seq_len=CONTEXT) for name, config in FAMILY.items()}


class Memory:
    """A source with all arrays in memory."""

    def __init__(self, config, params, dtype="float32", files=None):
        self.description = formats.Description(config, dtype, files or {})
        self._params = params

    def read(self, path, layer):
        node = self._params
        for key in path.split("/"):
            node = node[key]
        return node if layer is None else node[layer]


def flat(params):
    leaves = jax.tree.leaves_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(source, params):
    """Checks that every array of the source equals that of the tree, bit for bit."""
    wanted = flat(params)
    assert set(formats.shapes(source.description.config.model)) == set(wanted)
    for path, layer in formats.paths_and_layers(source.description.config.model):
        want = wanted[path] if layer is None else wanted[path][layer]
        got = source.read(path, layer)
        assert got.dtype == want.dtype and got.shape == want.shape, path
        assert got.tobytes() == want.tobytes(), path


def exported(folder, config, params=None, dtype="", files=None):
    params = random_params(config.model) if params is None else params
    convert(Memory(config, params, files=files), "hf", folder, dtype)
    return folder


@pytest.fixture
def hf(tmp_path):
    return exported(tmp_path / "hf", GROUPED)


# Import and export.


@pytest.mark.parametrize("name", FAMILY)
def test_hugging_face_and_back(name, tmp_path):
    from llama_jax.checkpoint.saved_step import find_step, load_meta, load_params

    config = FAMILY[name]
    params = random_params(config.model)
    source = HfSource(exported(tmp_path / "hf", config, params))
    assert source.description.config.model == config.model
    assert source.description.config.train.seq_len == CONTEXT
    assert_same(source, params)
    convert(source, "ckpt", tmp_path / "run")
    step = find_step(tmp_path / "run")
    meta = load_meta(step)
    assert meta.config == source.description.config and meta.step == 0
    assert (tmp_path / "run" / "config.json").read_text() == meta.config.to_json()
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        shapes = abstract_state(meta.config).params
        target = with_shardings(shapes, param_shardings(shapes, mesh))
        jax.tree.map(np.testing.assert_array_equal, load_params(step, target), params)
    assert_same(open_source("ckpt", tmp_path / "run"), params)


def test_a_trained_checkpoint_goes_out(tmp_path, capfd):
    """A checkpoint that orbax wrote from a mesh is exported, with a model card."""
    from llama_jax.checkpoint.checkpointer import Checkpointer
    from llama_jax.checkpoint.saved_step import StepMeta

    config = replace(GROUPED, data__mixture="web=0.7,books=0.3")
    mesh = mesh_of((1, 2, 1, 2))
    with jax.set_mesh(mesh):
        state = shared_step(config, mesh).init(jax.random.key(0))
        with Checkpointer(tmp_path / "run", config) as saver:
            saver.save(state.to_items(), StepMeta(config, 5, "data-1", b""))
    records = [
        {"step": 3, "loss": 2.5, "tokens_per_second": 1280.0, "chip_seconds": 7000.0},
        # Killed and resumed from step 2: the chip-hours include the lost step.
        {"step": 3, "loss": 2.5, "tokens_per_second": 1280.0, "chip_seconds": 1640.0},
        {"step": 4, "loss": 2.5, "tokens_per_second": 1280.0, "chip_seconds": 540.0},
        {"step": 5, "eval_loss": 3.25},
    ]
    records.append({"step": 6, "loss": 9.0, "chip_seconds": 1e9})
    lines = [json.dumps(record) for record in records]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step"')
    convert(open_source("ckpt", tmp_path / "run"), "hf", tmp_path / "hf")
    assert_same(HfSource(tmp_path / "hf"), jax.device_get(state.params))
    card = (tmp_path / "hf" / "README.md").read_text()
    tokens = 5 * 32 * 16
    flops = tokens * flops_per_token(config.model, config.lora, 16)
    for text in (
        f"| parameters | {parameter_count(config.model):,} |",
        "| steps | 5 of 20 |",
        f"| tokens seen | {tokens:,} (32 x 16 a step) |",
        "| mixture | web=0.7,books=0.3 |",
        f"| compute | {flops:.2e} FLOPs",
        "| training loss | 2.5000 nats per token |",
        "| validation loss | 3.2500 nats per token |",
        "| speed | 1,280 tokens/s (median) |",
        "| chip-hours | 2.55 of cpu, with evaluation, saving, and steps that were repeated",
    ):
        assert text in card
    assert capfd.readouterr().err == ""


def test_the_card_names_the_schedule(tmp_path):
    from llama_jax.checkpoint.saved_step import StepMeta
    from llama_jax.interchange import model_card

    meta = StepMeta(replace(TINY, optim__schedule="wsd"), 5, "", b"")
    text = model_card.render(meta, epath.Path(tmp_path / "checkpoints" / "5"))
    assert "| optimiser | AdamW, peak 0.01, 2 warm-up steps, wsd |" in text


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 2)])
def test_a_trained_checkpoint_is_stored_layer_by_layer(tmp_path, monkeypatch, shape):
    """Large layers are stored one by one, so that export reads one at a time."""
    from llama_jax.checkpoint import saving
    from llama_jax.checkpoint.checkpointer import Checkpointer
    from llama_jax.checkpoint.saved_step import StepMeta, find_step, load_params

    matrix = TINY.model.dim * TINY.model.ffn_dim * 4
    monkeypatch.setattr(saving, "LAYER_BYTES", matrix // mesh_of(shape).size)
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        step = shared_step(TINY, mesh)
        state = step.init(jax.random.key(0))
        with Checkpointer(tmp_path / "run", TINY) as saver:
            saver.save(state.to_items(), StepMeta(TINY, 5, "data-1", b""))
        source = open_source("ckpt", tmp_path / "run")
        parts = {
            path: source._stores[path].chunk_layout.read_chunk.shape[0] for path in source._stores
        }
        assert parts["layers/mlp/w1"] == parts["layers/mlp/w2"] == 1
        assert parts["layers/attn/wq"] == parts["layers/mlp_norm"] == TINY.model.n_layers
        assert_same(source, jax.device_get(state.params))
        assert source._block[2] is None  # read to its end, and freed
        target = with_shardings(abstract_state(TINY).params, step.state_shardings.params)
        loaded = load_params(find_step(tmp_path / "run"), target)
    jax.tree.map(np.testing.assert_array_equal, loaded, state.params)


def test_what_is_written_is_what_orbax_writes(tmp_path):
    """Both write the same description of the tree (`_METADATA`)."""
    from llama_jax.checkpoint.checkpointer import Checkpointer
    from llama_jax.checkpoint.saved_step import StepMeta

    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        state = shared_step(GROUPED, mesh).init(jax.random.key(0))
        with Checkpointer(tmp_path / "orbax", GROUPED) as saver:
            saver.save(state.to_items(), StepMeta(GROUPED, 0, "data-1", b""))
    convert(Memory(GROUPED, jax.device_get(state.params)), "ckpt", tmp_path / "ours")

    def described(name):
        file = tmp_path / name / "checkpoints" / "0" / "params" / "_METADATA"
        return json.loads(file.read_text())

    assert described("ours") == described("orbax")


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 2, 2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_straight_onto_a_mesh(tmp_path, shape, tied):
    config = replace(GROUPED, model__tied_embeddings=tied, model__n_layers=3)
    params = random_params(config.model)
    folder = exported(tmp_path / "hf", config, params)
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        shardings = param_shardings(abstract_state(config).params, mesh)
        loaded = load_hf(folder, config, shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == shardings
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(UserError, match="other shapes than this config"):
        load_hf(folder, replace(config, model__n_layers=2), shardings)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes(tmp_path, dtype):
    params = random_params(GROUPED.model)
    source = HfSource(exported(tmp_path / "hf", GROUPED, params, dtype))
    assert source.description.dtype == dtype
    compute = source.description.config.model.compute_dtype
    assert compute == ("float32" if dtype == "float32" else "bfloat16")
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    assert_same(source, jax.tree.map(lambda leaf: leaf.astype(kind), params))
    # Further conversions lose nothing: float32 holds every value of these dtypes.
    convert(source, "ckpt", tmp_path / "run")
    convert(open_source("ckpt", tmp_path / "run"), "hf", tmp_path / "again", dtype)
    first, again = (tmp_path / name / "model.safetensors" for name in ("hf", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_shards_are_as_the_library_reads_them(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    params = random_params(GROUPED.model)
    description = formats.Description(GROUPED, "float32", {})
    target = HfTarget(epath.Path(tmp_path), description, "float32", shard_size=20_000)
    for path, layer in reversed(list(formats.paths_and_layers(GROUPED.model))):
        target.write(path, layer, Memory(GROUPED, params).read(path, layer))
    target.close()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    read = {}
    for file in files:
        tensors = library.load_file(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
        read |= tensors
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read.values())
    assert set(index["weight_map"]) == set(read)
    w1 = params["layers"]["mlp"]["w1"]
    np.testing.assert_array_equal(read["model.layers.1.mlp.gate_proj.weight"], w1[1].T)
    assert_same(HfSource(tmp_path), params)


def test_tokenizer_files_travel(tmp_path, tokenizer):
    config = replace(GROUPED, model__vocab_size=300)
    files = {
        "tokenizer.model": tokenizer.model_bytes,
        "tokenizer_config.json": b'{"x": 1}',
        "generation_config.json": b'{"eos_token_id": [2, 7], "bos_token_id": 1}',
    }
    exported(tmp_path / "hf", config, files=files)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (1, [2, 7])
    convert(HfSource(tmp_path / "hf"), "ckpt", tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == tokenizer.model_bytes
    meta = saved_step.load_meta(tmp_path / "run" / "checkpoints" / "0")
    assert meta.tokenizer_model == tokenizer.model_bytes
    source = open_source("ckpt", tmp_path / "run")
    assert source.description.files == files
    convert(source, "hf", tmp_path / "again")
    for name, content in files.items():
        assert (tmp_path / "again" / name).read_bytes() == content


def test_special_ids_of_config_json_are_not_lost(tmp_path, hf):
    edit(hf, bos_token_id=11, eos_token_id=12)
    (hf / "generation_config.json").unlink()
    convert(HfSource(hf), "ckpt", tmp_path / "run")
    convert(open_source("ckpt", tmp_path / "run"), "hf", tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (11, 12)


# config.json.


def edit(folder, **changes):
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    values = {name: value for name, value in values.items() if value != "absent"}
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("absent", [("rope_parameters",), ("rope_theta", "rope_scaling")])
def test_both_versions_of_config_json_are_read(absent):
    for name, config in FAMILY.items():
        values = json.loads(hf_config.to_json(config, "float32", (1, 2)))
        for field in absent:
            del values[field]
        read = hf_config.parse(json.dumps(values), "config.json")
        assert read.model == replace(config, model__compute_dtype="bfloat16").model, name


def test_an_old_config_json_has_defaults():
    values = {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32}
    values |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf_config.parse(json.dumps(values), "config.json")
    assert (config.model.n_kv_heads, config.model.rope_theta) == (4, 1e4)
    assert (config.model.norm_eps, config.train.seq_len) == (1e-6, 2048)
    mistral = hf_config.parse(
        json.dumps({**values, "architectures": ["MistralForCausalLM"], "num_attention_heads": 8}),
        "config.json",
    )
    assert (mistral.model.n_kv_heads, mistral.model.sliding_window) == (8, 4096)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "unknown architecture 'GemmaForCausalLM'"),
        ({"architectures": "absent", "model_type": "qwen2"}, "unknown architecture 'qwen2'"),
        ({"vocab_size": "absent"}, "does not have 'vocab_size'"),
        ({"hidden_size": "large"}, "hidden_size must be of type int, got 'large'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE of type 'longrope'"),
        ({"rope_theta": 5.0}, "rope_theta and rope_parameters disagree"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads=4 is not a multiple of num_key_value_heads=3",
        ),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.self_attn.k_proj.weight and 8 more"),
        ({"num_hidden_layers": 1}, "holds model.layers.1.self_attn.k_proj.weight and 8 more"),
        ({"intermediate_size": 50}, r"shape (48, 32), config.json requires (50, 32)"),
        ({"vocab_size": 65}, "embed_tokens.weight has shape (64, 32), config.json requires (65,"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
    ],
)
def test_config_json_that_is_not_ours_or_not_its(hf, tmp_path, changes, message):
    edit(hf, **changes)
    with pytest.raises(UserError) as caught:
        HfSource(hf)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Damaged files.


def sharded(folder):
    target = HfTarget(
        epath.Path(folder), formats.Description(GROUPED, "float32", {}), "float32", 20_000
    )
    params = random_params(GROUPED.model)
    for unit in formats.paths_and_layers(GROUPED.model):
        target.write(*unit, Memory(GROUPED, params).read(*unit))
    target.close()


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def rewrite(folder, change):
    """Reads the tensors of a file, applies `change` to them, and writes the file anew."""
    path = folder / "model.safetensors"
    tensors = {
        name: safetensors.read_rows(e)
        for name, e in safetensors.read_header(epath.Path(path)).items()
    }
    change(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    writer = safetensors.Writer(epath.Path(folder), shapes, np.float32, 10**9)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


def header(folder, old, new):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))


DAMAGE = {
    "truncated": (truncate, "model.safetensors is truncated: it has"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is not a safetensors file"),
    "text": (
        lambda f: (f / "model.safetensors").write_bytes(b"<html>" * 99),
        "is not a safetensors file",
    ),
    "header": (lambda f: header(f, b'{"__metadata__"', b'["__metadata__"'), "header is damaged"),
    "cut in the header": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:99]
        ),
        "is truncated: its header alone has",
    ),
    "dtype": (lambda f: header(f, b'"dtype":"F32"', b'"dtype":"I32"'), "has dtype I32"),
    "shape": (lambda f: header(f, b'"shape":[64,32]', b'"shape":[64,31]'), "do not fit its shape"),
    "missing": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), "lacks model.norm.wei"),
    "extra": (
        lambda f: rewrite(f, lambda t: t.update(bias=np.zeros(3, np.float32))),
        "holds bias, unknown to config.json",
    ),
    "config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "tokenizer": (
        lambda f: (f / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 64}]})
        ),
        "tokenizer.json has 65 ids, but the model's vocabulary is 64",
    ),
    "generation": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json is not valid JSON",
    ),
    "ends": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [1, "</s>"]}'),
        "eos_token_id=[1, '</s>'] is not a token id",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json is not a"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_in_one_line(hf, kind):
    damage, message = DAMAGE[kind]
    damage(hf)
    with pytest.raises(UserError) as caught:
        HfSource(hf)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_sentencepiece_vocabulary_that_disagrees(tmp_path, tokenizer):
    config = replace(GROUPED, model__vocab_size=299)
    exported(tmp_path / "hf", config, files={"tokenizer.model": tokenizer.model_bytes})
    with pytest.raises(UserError, match="tokenizer.model has 300 ids, .* vocabulary is 299"):
        HfSource(tmp_path / "hf")


def test_shards_that_are_missing(tmp_path):
    sharded(tmp_path)
    HfSource(tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    second.rename(tmp_path / "aside")
    with pytest.raises(UserError, match=rf"lacks {second.name}, which .*index.json names"):
        HfSource(tmp_path)
    shutil.copy(first, second)
    with pytest.raises(UserError, match=r"lacks model\..*, which .*index.json names"):
        HfSource(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="several safetensors files, but no model.safetensors.ind"):
        HfSource(tmp_path)


def test_an_index_that_names_files_elsewhere(tmp_path):
    (tmp_path / "weights").mkdir()
    sharded(tmp_path / "weights")
    index = tmp_path / "weights" / "model.safetensors.index.json"
    first = min(tmp_path.glob("weights/*.safetensors"))
    first.rename(tmp_path / first.name)
    index.write_text(index.read_text().replace(first.name, f"../{first.name}"))
    with pytest.raises(UserError, match=rf"names files outside its folder: \.\./{first.name}"):
        HfSource(tmp_path / "weights")


# A target is written completely or not at all.


def test_a_target_that_exists_is_refused(hf, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("years")
    for kind in ("hf", "ckpt"):
        with pytest.raises(UserError, match="mine exists; choose another"):
            convert(HfSource(hf), kind, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis").read_text() == "years"


@pytest.mark.parametrize("kind", ["hf", "ckpt"])
def test_a_conversion_that_fails_leaves_nothing(hf, tmp_path, kind):
    source = HfSource(hf)
    with (hf / "model.safetensors").open("r+b") as file:
        file.truncate(30_000)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="model.safetensors ended while it was read"):
        convert(source, kind, tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == before


def test_the_rest_of_a_killed_conversion_does_not_matter(hf, tmp_path):
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "junk").write_text("x")
    convert(HfSource(hf), "hf", tmp_path / "new")
    assert not (tmp_path / "new.partial").exists() and not (tmp_path / "new" / "junk").exists()


def test_numbers_too_large_for_float16(tmp_path):
    params = random_params(GROUPED.model)
    params["layers"]["mlp"]["w2"][1, 0, 0] = 70_000
    with pytest.raises(UserError, match=r"layers.1.mlp.down_proj.weight has numbers too large"):
        exported(tmp_path / "hf", GROUPED, params, "float16")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1000))
    with pytest.raises(UserError, match=r"writing takes up to .* GB, the disk has 0.00 GB free"):
        convert(HfSource(hf), "ckpt", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


@pytest.mark.parametrize("text", [None, "", "hf", "hf:", "gguf:x", "x"])
def test_places(text):
    with pytest.raises(UserError, match="--source must be FORMAT:DIR with FORMAT one of hf, meta"):
        parse_place(text, "source")
    kind, folder = parse_place("hf:gs://bucket/x", "source")
    assert (kind, str(folder)) == ("hf", "gs://bucket/x")


# Memory.


@pytest.mark.slow
@pytest.mark.long
def test_7b_takes_less_than_4_gb(tmp_path):
    """Import and export hold one layer in memory at a time.

    Uses 8 of the 32 layers, with a quarter of the 41 GB of disk and of the time.
    benchmarks/convert.py converts all 32, and its README has the results.
    """
    config = benchmark.llama2_7b(layers=8)
    for result in benchmark.in_and_out(config, tmp_path):
        print(result)
        assert result["peak_gb"] < 4
    source, original = HfSource(tmp_path / "again"), benchmark.Repeated(config)
    for path, layer in (("embed", None), ("layers/attn/wq", 6), ("layers/mlp/w2", 7)):
        assert source.read(path, layer).tobytes() == original.read(path, layer).tobytes()
    shutil.rmtree(tmp_path / "again")


@pytest.mark.slow
def test_what_was_trained_goes_out_layer_by_layer(tmp_path, monkeypatch):
    """16 layers have matrices of 46 MB; Python, JAX and tensorstore alone take about 0.5 GB."""
    # Without this, glibc keeps up to 0.3 GB that tensorstore's threads freed, or more under load.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    (result,) = benchmark.trained(tmp_path)
    print(result)
    assert result["peak_gb"] < 0.5 + 6 * 0.046
    source = HfSource(tmp_path / "exported")
    for layer in (0, 7, 15):
        assert (source.read("layers/mlp/w1", layer) == layer).all()
