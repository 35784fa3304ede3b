"""Import and export of adapters in PEFT's format."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax.checkpoint import saved_step
from llama_jax.config import LoraConfig
from llama_jax.errors import UserError
from llama_jax.inference.loaded_model import open_model
from llama_jax.interchange import peft, safetensors
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.transfer import convert, export_adapters, import_adapters
from llama_jax.model.lora import merge
from llama_jax.train.step import abstract_state
from tests.helpers import (
    ROOT,
    random_adapters,
    random_params,
    replace,
    run_command,
    save_checkpoint,
)
from tests.model.test_lora import PEFT_CASES
from tests.reference import mutations

GOLDEN = ROOT / "tests" / "goldens" / "peft"  # written by peft itself, see make_lora_goldens
CASE = PEFT_CASES["some"]


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def base(tmp_path):
    """Returns the base of the golden as a place, `hf:FOLDER`."""
    plain = replace(CASE, lora=LoraConfig(), init_from="")
    save_checkpoint(tmp_path / "base", plain, random_params(CASE.model), b"")
    convert(open_source("ckpt", epath.Path(tmp_path / "base")), "hf", tmp_path / "hf")
    return f"hf:{tmp_path / 'hf'}"


def test_what_peft_saves_is_read():
    lora, name = peft.read_config(epath.Path(GOLDEN))
    assert lora == LoraConfig(rank=2, alpha=3.0, targets="wq,wv,w2")
    assert name == "a/base"
    equal(peft.read(epath.Path(GOLDEN), CASE.model, lora), random_adapters(CASE))


def test_what_we_write_is_what_peft_saves(tmp_path):
    peft.write(epath.Path(tmp_path), replace(CASE, init_from="hf:a/base"), random_adapters(CASE))
    file = "adapter_model.safetensors"
    ours, theirs = (safetensors.read_header(epath.Path(p / file)) for p in (tmp_path, GOLDEN))
    assert set(ours) == set(theirs)
    for name, entry in theirs.items():
        equal(safetensors.read_rows(ours[name]), safetensors.read_rows(entry))
    ours, theirs = (json.loads((p / "adapter_config.json").read_text()) for p in (tmp_path, GOLDEN))
    assert set(ours["target_modules"]) == set(theirs["target_modules"])
    for name in set(ours) - {"target_modules"}:
        assert ours[name] == theirs[name], name


@pytest.mark.parity
def test_peft_loads_what_we_write(tmp_path):
    import torch
    from peft import PeftModel

    from tests.reference import hf_reference, peft_reference

    params, adapters = random_params(CASE.model), random_adapters(CASE)
    peft.write(epath.Path(tmp_path), CASE, adapters)
    loaded = PeftModel.from_pretrained(hf_reference.build(CASE.model, params), tmp_path)
    tokens = torch.arange(12)[None]
    expected = peft_reference.build(CASE, params, adapters)(input_ids=tokens).logits
    assert torch.equal(loaded(input_ids=tokens).logits, expected)


FULL = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("up_proj", "gate_proj")]
FORMS = {  # fields of PEFT's LoraConfig
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "one": {"target_modules": ["k_proj"]},
    "parents": {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]},
    "full names": {"target_modules": FULL},
    "expression": {"target_modules": r".*\.self_attn\.(q|k|v|o)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["v_proj", "mlp.up_proj"]},
    "silent": {},
    "rank": {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}},
    "ranks": {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {r".*_proj": 3}},
    "alpha": {"target_modules": ["up_proj"], "alpha_pattern": {"mlp.up_proj": 9}},
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 4}},
    "layers": {"target_modules": ["v_proj"], "layers_to_transform": [1, 0]},
    "fan": {"target_modules": ["v_proj"], "fan_in_fan_out": True},
    "empty lists": {"target_modules": ["v_proj"], "modules_to_save": [], "layers_to_transform": []},
}


def saved_by_peft(folder, form):
    """Saves a random PEFT adapter; returns tokens and their logits after PEFT merged it."""
    import peft as library
    import torch

    from tests.reference import hf_reference

    base = hf_reference.build(CASE.model, random_params(CASE.model))
    config = library.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **form)
    model = library.get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        plain = hf_reference.build(CASE.model, random_params(CASE.model))(input_ids=tokens).logits
        logits = model.merge_and_unload()(input_ids=tokens).logits.numpy()
    assert np.abs(plain.numpy() - logits).max() > 0.05
    return tokens.numpy(), logits


def merged_logits(folder, base, tokens):
    from tests.interchange.test_transfer_parity import our_logits

    return our_logits(open_source("peft", epath.Path(folder), base=base), tokens)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_peft_are_merged_as_peft_does(tmp_path, base, form):
    tokens, expected = saved_by_peft(tmp_path / "peft", FORMS[form])
    got = merged_logits(tmp_path / "peft", base, tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)
    # Also as people write the file: PEFT saves all-linear as a list, and resets some flags.
    config = tmp_path / "peft" / "adapter_config.json"
    saved = json.loads(config.read_text())
    if any(saved[name] != value for name, value in FORMS[form].items()):
        config.write_text(json.dumps({**saved, **FORMS[form]}))
        np.testing.assert_array_equal(merged_logits(tmp_path / "peft", base, tokens), got)


def as_pickle(change):
    """Returns a function that replaces adapter_model.safetensors by adapter_model.bin."""

    def write(folder):
        import safetensors.torch
        import torch

        tensors = safetensors.torch.load_file(folder / peft.WEIGHTS)
        (folder / peft.WEIGHTS).unlink()
        torch.save(*change(tensors, folder / peft.PICKLE))

    return write


def with_adapter_name(folder):
    import safetensors.torch

    tensors = safetensors.torch.load_file(folder / peft.WEIGHTS)
    named = {name.replace(".weight", ".default.weight"): x for name, x in tensors.items()}
    safetensors.torch.save_file(named, folder / peft.WEIGHTS)


STORED = {
    "pickle": as_pickle(lambda tensors, file: (tensors, file)),
    "transposed": as_pickle(lambda t, f: ({n: x.T.contiguous().T for n, x in t.items()}, f)),
    "float16": as_pickle(lambda tensors, file: ({n: x.half() for n, x in tensors.items()}, file)),
    "bfloat16": as_pickle(lambda t, file: ({n: x.bfloat16() for n, x in t.items()}, file)),
    "adapter's name": with_adapter_name,
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", STORED)
def test_files_of_adapters_are_read_as_peft_does(tmp_path, base, kind):
    import peft as library
    import torch

    from tests.reference import hf_reference

    tokens, _ = saved_by_peft(tmp_path / "peft", FORMS["expression"])
    STORED[kind](tmp_path / "peft")
    theirs = library.PeftModel.from_pretrained(
        hf_reference.build(CASE.model, random_params(CASE.model)), tmp_path / "peft"
    )
    with torch.no_grad():
        expected = theirs.merge_and_unload()(input_ids=torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(
        merged_logits(tmp_path / "peft", base, tokens), expected, rtol=0, atol=2e-5
    )


def test_changes_of_the_config_end_in_one_line(tmp_path):
    """400 changes of adapter_config.json give the same adapters or a one-line error."""
    folder, read = shutil.copytree(GOLDEN, tmp_path / "adapters"), 0
    path = folder / "adapter_config.json"
    for content in mutations.of_json_file(path.read_bytes(), 400):
        path.write_bytes(content)
        try:
            lora, _ = peft.read_config(epath.Path(folder))
            peft.read(epath.Path(folder), CASE.model, lora)
        except UserError as error:
            assert len(str(error).splitlines()) == 1, content
            continue
        read += 1
        assert (lora.rank, set(lora.names)) == (2, {"wq", "wv", "w2"}), content
    assert 50 < read < 300


def test_adapters_of_some_layers(tmp_path, base):
    folder = shutil.copytree(GOLDEN, tmp_path / "adapters")
    values = json.loads((folder / "adapter_config.json").read_text())
    for changes in ({"layers_to_transform": [0]}, {"exclude_modules": r".*\.1\..*q_proj"}):
        (folder / "adapter_config.json").write_text(json.dumps({**values, **changes}))
        with pytest.raises(UserError, match="adapters of some layers only are not supported"):
            import_adapters(epath.Path(folder), tmp_path / "run", base)


def test_rslora_is_alpha_of_another_size(tmp_path):
    values = json.loads((GOLDEN / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "use_rslora": True}))
    lora, _ = peft.read_config(epath.Path(tmp_path))
    assert lora.scale == pytest.approx(3 / 2**0.5)


def test_adapters_go_round_and_keep_their_base(tmp_path, base):
    import_adapters(epath.Path(GOLDEN), tmp_path / "run", base)
    folder = saved_step.find_step(tmp_path / "run")
    meta = saved_step.load_meta(folder)
    assert meta.config.lora == LoraConfig(rank=2, alpha=3.0, targets="wq,wv,w2")
    assert meta.config.init_from == base and "layers/attn/wq" in meta.base
    equal(
        saved_step.load_adapters(folder, abstract_state(meta.config).params),
        random_adapters(CASE),
    )
    export_adapters(epath.Path(tmp_path / "run"), tmp_path / "again")
    lora, name = peft.read_config(epath.Path(tmp_path / "again"))
    assert lora == meta.config.lora and f"hf:{name}" == base
    equal(peft.read(epath.Path(tmp_path / "again"), CASE.model, lora), random_adapters(CASE))
    # The run stores the fingerprint of its base: a base with other bits is refused.
    other = {**random_params(CASE.model), "embed": np.ones((64, 32), np.float32)}
    plain = replace(CASE, lora=LoraConfig(), init_from="")
    save_checkpoint(tmp_path / "other", plain, other, b"")
    place, message = (
        f"ckpt:{tmp_path / 'other'}",
        r"another base than ckpt:\S+ \(other fingerprints: embed\)",
    )
    with pytest.raises(UserError, match=message):
        source = open_source("ckpt", epath.Path(tmp_path / "run"), base=place)
        convert(source, "hf", tmp_path / "merged")
    with pytest.raises(UserError, match=message):
        export_adapters(epath.Path(tmp_path / "run"), tmp_path / "wrong", base=place)
    assert not (tmp_path / "wrong").exists()
    # An export names a copy of the base; without one, it does not read the base at all.
    shutil.move(tmp_path / "hf", tmp_path / "moved")
    export_adapters(epath.Path(tmp_path / "run"), tmp_path / "named", f"hf:{tmp_path / 'moved'}")
    assert peft.read_config(epath.Path(tmp_path / "named"))[1] == str(tmp_path / "moved")
    places = (f"--source=ckpt:{tmp_path / 'run'}", f"--target=peft:{tmp_path / 'half'}")
    process = run_command("convert", *places, "--dtype=bfloat16")
    assert process.returncode == 0, process.stderr
    assert peft.read_config(epath.Path(tmp_path / "half")) == (lora, name)
    entries = safetensors.read_header(epath.Path(tmp_path / "half" / peft.WEIGHTS))
    assert {entry.dtype for entry in entries.values()} == {np.dtype("bfloat16")}


def test_weights_without_adapters(tmp_path, base):
    checkpoint = epath.Path(tmp_path / "base")
    with pytest.raises(UserError, match=r"base/checkpoints/0 has no adapters: its run trained all"):
        export_adapters(checkpoint, tmp_path / "adapters")
    for kind, folder in (("ckpt", checkpoint), ("hf", epath.Path(tmp_path / "hf"))):
        with pytest.raises(UserError, match=r"--base names the base .* has no adapters"):
            open_source(kind, folder, base=base)
    with pytest.raises(UserError, match=r"--base names the base .* has no adapters"):
        open_model(checkpoint, base=base)


def test_adapters_of_peft_are_merged_as_peft_does(tmp_path, base):
    source = open_source("peft", epath.Path(GOLDEN), base=base)
    expected = merge(random_params(CASE.model), random_adapters(CASE), CASE.lora)
    for path in ("layers/attn/wq", "layers/attn/wk", "layers/mlp/w2"):
        _, group, name = path.split("/")
        got = source.read(path, 1)
        np.testing.assert_allclose(got, expected["layers"][group][name][1], rtol=0, atol=1e-6)
    assert source.description.config.lora == LoraConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not sup"),
        ({"kasa_config": {"r": 1}}, "kasa_config={'r': 1} is not supported"),
        ({"target_modules": ["c_attn"]}, r"target_modules=\['c_attn'\] must be some of q_proj"),
        ({"target_modules": ["q_proj", "lm_head"]}, "must be some of .*it names lm_head, too"),
        ({"target_modules": r".*embed_tokens"}, "must be some of .*it names model.embed_tokens"),
        ({"r": None}, "adapter_config.json is not a supported LoRA config"),
        ({"r": 0}, "r must be positive, got 0"),
        ({"lora_alpha": 0}, "lora.alpha must be positive, got 0"),
        ({"rank_pattern": {"q_proj": 4}}, r"several ranks or alphas \(rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, r"several ranks or alphas \(rank_pattern"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"r": 4}, r"has shape \(2, 32\), the base requires \(4, 32\)"),
        ({"target_modules": ["q_proj"]}, r"has base_model\S+ contrary to adapter_config.json"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}, r"lacks base_model"),
        ({"base_model_name_or_path": "not/here"}, r"not/here, the base of .*--base=hf:DIR"),
    ],
)
def test_other_adapters_are_told(tmp_path, base, changes, message):
    folder = shutil.copytree(GOLDEN, tmp_path / "adapters")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**values, **changes}))
    place = "" if "base_model_name_or_path" in changes else base
    with pytest.raises(UserError, match=message):
        import_adapters(epath.Path(folder), tmp_path / "run", place)
    assert not (tmp_path / "run").exists()
