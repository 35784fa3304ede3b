import jax
import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.inference import cast_matrices, decoding_mesh, parse_mesh
from llama_jax.model import logits
from tests.helpers import TINY, random_params, replace


@pytest.mark.parametrize(("kv_heads", "tensor"), [(4, 4), (2, 2), (1, 1)])
def test_decoding_uses_as_many_devices_as_divide(kv_heads, tensor):
    mesh = decoding_mesh(replace(TINY, model__n_kv_heads=kv_heads).model)
    assert mesh.shape["tensor"] == mesh.size == tensor


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("tensor=2", (1, 1, 1, 2)),
        ("fsdp=2, tensor=4", (1, 2, 1, 4)),
        ("data=2,fsdp=-1", (2, 4, 1, 1)),
    ],
)
def test_a_mesh_in_words(text, sizes):
    assert tuple(parse_mesh(text).shape.values()) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor", "'tensor' is not AXIS=DEVICES"),
        ("fsdp=2,model=2", "'model=2' is not AXIS=DEVICES"),
        ("tensor=x", "'tensor=x' is not"),
        ("fsdp=16", "does not cover 8 devices"),
        ("context=2", "context is for training"),
        ("tensor=0", "must be positive"),
        ("fsdp=-1,tensor=-1", "only one mesh axis may be -1"),
    ],
)
def test_no_mesh_in_words(text, message):
    with pytest.raises(UserError, match=message):
        parse_mesh(text)


def test_cast_weights_give_the_same_logits():
    config = replace(TINY, model__compute_dtype="bfloat16").model
    params = random_params(config)
    cast = cast_matrices(config, jax.tree.map(jax.numpy.asarray, params))
    assert cast["layers"]["attn"]["wq"].dtype == cast["embed"].dtype == "bfloat16"
    assert cast["layers"]["mlp_norm"].dtype == cast["final_norm"].dtype == "float32"
    tokens = np.arange(12)[None]
    np.testing.assert_array_equal(logits(config, cast, tokens), logits(config, params, tokens))
