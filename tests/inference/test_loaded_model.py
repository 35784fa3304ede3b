import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.inference.decode import Sampling, generate
from llama_jax.inference.loaded_model import cast_matrices, decoding_mesh, open_model
from llama_jax.inference.logprobs import Scorer, Span
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.transfer import convert
from llama_jax.model.llama import logits
from tests.helpers import TINY, random_params, replace, save_checkpoint


@pytest.mark.parametrize(("kv_heads", "tensor"), [(4, 4), (2, 2), (1, 1)])
def test_decoding_uses_as_many_devices_as_divide(kv_heads, tensor):
    mesh = decoding_mesh(replace(TINY, model__n_kv_heads=kv_heads).model)
    assert mesh.shape["tensor"] == mesh.size == tensor


def test_cast_weights_give_the_same_logits():
    config = replace(TINY, model__compute_dtype="bfloat16").model
    params = random_params(config)
    cast = cast_matrices(config, jax.tree.map(jax.numpy.asarray, params))
    assert cast["layers"]["attn"]["wq"].dtype == cast["embed"].dtype == "bfloat16"
    assert cast["layers"]["mlp_norm"].dtype == cast["final_norm"].dtype == "float32"
    tokens = np.arange(12)[None]
    np.testing.assert_array_equal(logits(config, cast, tokens), logits(config, params, tokens))


def test_why_there_is_no_tokenizer(tmp_path):
    params = random_params(TINY.model)
    save_checkpoint(tmp_path / "run", TINY, params, b"")
    with pytest.raises(UserError, match=r"has no tokenizer.*it was trained on synthetic data"):
        open_model(tmp_path / "run")
    convert(open_source("ckpt", tmp_path / "run"), "hf", tmp_path / "hf")
    convert(open_source("hf", tmp_path / "hf"), "ckpt", tmp_path / "imported")
    with pytest.raises(UserError, match="imported without a tokenizer; put tokenizer.model") as one:
        open_model(tmp_path / "imported")
    assert "synthetic" not in str(one.value) and "\n" not in str(one.value)


def test_a_checkpoint_opens_with_its_weights_where_they_belong(tokenizer, tmp_path):
    config = replace(TINY, model__vocab_size=304, train__seq_len=24)  # with padding rows
    params = random_params(config.model)
    save_checkpoint(tmp_path / "run", config, params, tokenizer.model_bytes)
    for mesh, sizes in (("fsdp=2,tensor=2", (1, 2, 1, 2)), ("", (1, 1, 1, 4))):
        model = open_model(tmp_path / "run", mesh)
        assert tuple(model.mesh.shape.values()) == sizes
        assert model.context == 24 and model.tokenizer.fingerprint == tokenizer.fingerprint
        wq = model.params["layers"]["attn"]["wq"]
        assert wq.sharding.mesh == model.mesh and "tensor" in wq.sharding.spec
        np.testing.assert_array_equal(wq, params["layers"]["attn"]["wq"])


def test_a_vocabulary_that_tensor_does_not_divide(tokenizer, tmp_path):
    """Each device holds the whole vocabulary; released models have 32,001 rows, for example."""
    config = replace(TINY, model__vocab_size=301, train__seq_len=24)
    params = random_params(config.model)
    save_checkpoint(tmp_path / "run", config, params, tokenizer.model_bytes)
    spans = [Span(tokenizer.encode_text("def main"), 3), Span([1, 300, 7], 2)]
    found = []
    for mesh in ("tensor=1", "fsdp=2,tensor=2", ""):
        model = open_model(tmp_path / "run", mesh)
        with jax.set_mesh(model.mesh):
            scores = Scorer(config.model, model.params, model.context, 2)(spans)
            sampling = Sampling(max_tokens=8, temperature=0.0)
            prompts = [span.tokens for span in spans]
            options = {"context": 24, "eos_id": 2, "n_ids": 300}
            new = generate(config.model, model.params, prompts, sampling, **options)
        found.append((np.concatenate([score.logprobs for score in scores]), new))
    assert model.mesh.shape["tensor"] == 4
    for logprobs, new in found[1:]:
        np.testing.assert_allclose(logprobs, found[0][0], atol=1e-5)
        assert new == found[0][1]


def test_checkpoints_that_cannot_write(tokenizer, tmp_path):
    params = random_params(TINY.model)
    save_checkpoint(tmp_path / "none", TINY, params, b"")
    with pytest.raises(UserError, match="has no tokenizer to read text"):
        open_model(tmp_path / "none")
    save_checkpoint(tmp_path / "small", TINY, params, tokenizer.model_bytes)
    with pytest.raises(UserError, match="has 300 ids, but model.vocab_size is 64"):
        open_model(tmp_path / "small")
    with pytest.raises(UserError, match="--checkpoint is missing"):
        open_model(None)
