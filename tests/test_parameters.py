"""The table of parameters, and the values derived from it, agree with the model."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.config import MATRICES, LoraConfig
from llama_jax.errors import UserError
from llama_jax.model.llama import init_params
from llama_jax.parameters import (
    PARAMETERS,
    Parameter,
    abstract,
    layer_matrices,
    path_of,
    present,
    row_of,
    sizes,
)
from tests.helpers import TINY, replace

# All axes have different sizes, so that a swap of two axes fails.
ODD = replace(
    TINY,
    model__vocab_size=384,
    model__dim=96,
    model__n_layers=3,
    model__n_heads=4,
    model__n_kv_heads=2,
    model__explicit_head_dim=10,
    model__ffn_dim=56,
).model


@pytest.mark.parametrize("tied", [False, True])
def test_the_rows_are_the_arrays_of_the_model_in_the_order_of_its_tree(tied):
    assert len(set(sizes(ODD).values())) == len(sizes(ODD))
    model = replace(replace(TINY, model=ODD), model__tied_embeddings=tied).model
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    assert abstract(model) == params
    found = [(path_of(keys), leaf.shape) for keys, leaf in jax.tree.leaves_with_path(params)]
    assert [(row.path, row.shape(model)) for row in present(model)] == found


def test_the_inputs_are_what_the_products_sum_over(monkeypatch):
    """Compares the rows with the model's einsums, which name all axes and those summed over."""
    from llama_jax.model import llama

    seen = {}
    original = llama.project_named

    def record(module, lora, name, equation, x, w):
        x_axes, w_axes = equation.partition("->")[0].split(",")
        seen[name] = (w_axes, "".join(axis for axis in w_axes if axis in x_axes))
        return original(module, lora, name, equation, x, w)

    monkeypatch.setattr(llama, "project_named", record)
    jax.eval_shape(functools.partial(init_params, ODD), jax.random.key(0))
    assert seen == {name: (row.own_axes, row.inputs) for name, row in layer_matrices().items()}


def test_the_kinds_of_the_rows():
    vectors = {path for path, row in PARAMETERS.items() if row.is_vector}
    assert vectors == {"layers/attn_norm", "layers/mlp_norm", "final_norm"}
    assert vectors == {path for path, row in PARAMETERS.items() if not row.decays}
    assert [row.path for row in PARAMETERS.values() if not row.is_matrix] == [
        "embed", "layers/attn_norm", "layers/mlp_norm", "final_norm",
    ]  # fmt: skip
    assert tuple(layer_matrices()) == MATRICES == LoraConfig().names


def test_parts_of_a_matrix_have_its_row():
    for path in ("layers/attn/wq", "layers/attn/wq/a", "layers/attn/wq/codes"):
        row = row_of(path)
        assert row is not None and row.path == "layers/attn/wq"
    assert row_of("layers/attn/wz") is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": P(None, "fsdp")}, "scale: its placement .* has more dimensions than D"),
        ({"placement": P(), "inputs": "F"}, "scale: its dimensions D do not begin with .* F"),
    ],
)
def test_a_row_that_contradicts_itself_is_an_error(fields, message):
    with pytest.raises(UserError, match=message):
        Parameter("scale", "D", **fields)


def test_the_shape_of_a_row_is_that_of_a_real_array():
    params = jax.jit(functools.partial(init_params, ODD))(jax.random.key(0))
    assert params["layers"]["attn"]["wo"].shape == (3, 4, 10, 96)
    assert params["layers"]["attn"]["wo"].dtype == jnp.float32
