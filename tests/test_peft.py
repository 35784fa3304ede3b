"""Adapters in and out of PEFT's format."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from llama_jax import checkpoint as checkpoint_lib
from llama_jax.config import LoraConfig
from llama_jax.convert import convert, export_adapters, import_adapters, open_source
from llama_jax.errors import UserError
from llama_jax.inference import open_model
from llama_jax.interchange import peft, safetensors
from llama_jax.lora import merge
from tests.helpers import (
    ROOT,
    random_adapters,
    random_params,
    replace,
    run_command,
    save_checkpoint,
)
from tests.test_lora import PEFT_CASES

GOLDEN = ROOT / "tests" / "goldens" / "peft"  # written by peft itself, see make_lora_goldens
CASE = PEFT_CASES["some"]


def equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture
def base(tmp_path):
    """The base of the golden, as a folder of Hugging Face."""
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

    from tests import hf_reference, peft_reference

    params, adapters = random_params(CASE.model), random_adapters(CASE)
    peft.write(epath.Path(tmp_path), CASE, adapters)
    loaded = PeftModel.from_pretrained(hf_reference.build(CASE.model, params), tmp_path)
    tokens = torch.arange(12)[None]
    expected = peft_reference.build(CASE, params, adapters)(input_ids=tokens).logits
    assert torch.equal(loaded(input_ids=tokens).logits, expected)


def test_rslora_is_alpha_of_another_size(tmp_path):
    values = json.loads((GOLDEN / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "use_rslora": True}))
    lora, _ = peft.read_config(epath.Path(tmp_path))
    assert lora.scale == pytest.approx(3 / 2**0.5)


def test_adapters_go_round_and_keep_their_base(tmp_path, base):
    import_adapters(epath.Path(GOLDEN), tmp_path / "run", base)
    folder = checkpoint_lib.find_step(tmp_path / "run")
    meta = checkpoint_lib.load_meta(folder)
    assert meta.config.lora == LoraConfig(rank=2, alpha=3.0, targets="wq,wv,w2")
    assert meta.config.init_from == base and "layers/attn/wq" in meta.base
    equal(checkpoint_lib.load_adapters(folder, meta.config), random_adapters(CASE))
    export_adapters(epath.Path(tmp_path / "run"), tmp_path / "again")
    lora, name = peft.read_config(epath.Path(tmp_path / "again"))
    assert lora == meta.config.lora and f"hf:{name}" == base
    equal(peft.read(epath.Path(tmp_path / "again"), CASE.model, lora), random_adapters(CASE))
    # Its fingerprint is that of the base, whose other bits are refused.
    other = {**random_params(CASE.model), "embed": np.ones((64, 32), np.float32)}
    plain = replace(CASE, lora=LoraConfig(), init_from="")
    save_checkpoint(tmp_path / "other", plain, other, b"")
    place, message = f"ckpt:{tmp_path / 'other'}", r"another base than ckpt:\S+ is \(embed differ"
    with pytest.raises(UserError, match=message):
        source = open_source("ckpt", epath.Path(tmp_path / "run"), base=place)
        convert(source, "hf", tmp_path / "merged")
    with pytest.raises(UserError, match=message):
        export_adapters(epath.Path(tmp_path / "run"), tmp_path / "wrong", base=place)
    assert not (tmp_path / "wrong").exists()
    # The same bits elsewhere are named; without a word nothing is read of the base.
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
        with pytest.raises(UserError, match=r"--base is of the weights below .* has no adapters"):
            open_source(kind, folder, base=base)
    with pytest.raises(UserError, match=r"--base is of the weights below .* has no adapters"):
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
        ({"r": None}, "adapter_config.json is no config of LoRA"),
        ({"r": 4}, r"has shape \(2, 32\), the base makes it \(4, 32\)"),
        ({"target_modules": ["q_proj"]}, r"has base_model\S+ against adapter_config.json"),
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
