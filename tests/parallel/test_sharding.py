import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from llama_jax.errors import UserError
from llama_jax.parallel import sharding
from llama_jax.parallel.mesh import AXES
from llama_jax.parallel.sharding import (
    activation_spec,
    constrain,
    devices_along,
    param_specs,
    weight_shards,
)
from llama_jax.parameters import PARAMETERS, Parameter, parameter_table
from llama_jax.train.step import abstract_state, train_step
from tests.helpers import QUICK, ROOT, TINY, mesh_of, random_batch, replace
from tests.test_config import load


def abstract_mesh(*sizes):
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4)


def test_the_table_has_twelve_rows():
    assert len(PARAMETERS) == 12


def test_each_parameter_has_its_row():
    mesh = abstract_mesh(1, 2, 2, 2)
    specs = param_specs(abstract_state(TINY).params, mesh)
    shard = ("fsdp", "context")
    assert specs["embed"] == P("tensor", shard)
    assert specs["layers"]["attn"]["wo"] == P(None, "tensor", None, shard)
    assert specs["layers"]["mlp"]["w2"] == P(None, "tensor", shard)
    assert specs["final_norm"] == P()


def test_tied_embeddings_need_no_head():
    config = replace(TINY, model__tied_embeddings=True)
    specs = param_specs(abstract_state(config).params, abstract_mesh(1, 8, 1, 1))
    assert "lm_head" not in specs


def test_a_parameter_without_a_row_is_an_error():
    params = dict(abstract_state(TINY).params)
    params["bias"] = jax.ShapeDtypeStruct((32,), jnp.float32)
    with pytest.raises(UserError, match=r"no row for parameter bias \(32,\)"):
        param_specs(params, abstract_mesh(1, 1, 1, 1))


def test_a_row_without_a_parameter_is_an_error():
    rows = {**PARAMETERS, **parameter_table(Parameter("layers/attn/wqkv", "LDH", P()))}
    with pytest.raises(UserError, match="no parameter for row.* layers/attn/wqkv"):
        param_specs(abstract_state(TINY).params, abstract_mesh(1, 1, 1, 1), rows=rows)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("LDH", r"layers/attn_norm has shape \(2, 32\), but its row has the dimensions LDH"),
        ("LH", r"layers/attn_norm .* makes H 32, but H is \d+ in layers/attn/wk"),
    ],
)
def test_letters_that_are_not_the_sizes_of_an_array_are_an_error(axes, message):
    rows = {**PARAMETERS, **parameter_table(Parameter("layers/attn_norm", axes, P(), decays=False))}
    with pytest.raises(UserError, match=message):
        param_specs(abstract_state(TINY).params, abstract_mesh(1, 1, 1, 1), rows=rows)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P("expert"), "final_norm: the mesh .* has no axis 'expert'"),
        (P(("fsdp", "fsdp")), "final_norm.* twice"),
    ],
)
def test_a_bad_row_is_an_error(spec, message):
    rows = {**PARAMETERS, **parameter_table(Parameter("final_norm", "D", spec))}
    with pytest.raises(UserError, match=message):
        param_specs(abstract_state(TINY).params, abstract_mesh(1, 2, 1, 1), rows=rows)


def test_a_dimension_that_does_not_divide_is_an_error():
    with pytest.raises(UserError, match=r"layers/attn/wk .* 4 does not divide over tensor = 8"):
        params = {**abstract_state(TINY).params}
        param_specs(params, abstract_mesh(1, 1, 1, 8))


def test_activation_axes_are_strict():
    assert activation_spec("batch", "seq", "embed") == P(("data", "fsdp"), "context", None)
    with pytest.raises(ValueError, match="unknown activation axis 'sequence'"):
        activation_spec("batch", "sequence")
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        activation_spec("heads", "ffn")
    with pytest.raises(ValueError, match="2 axis names for an array of shape"):
        constrain(jnp.zeros(3), "batch", "seq")


def test_devices_along_a_dimension():
    sizes = dict(zip(AXES, (2, 3, 5, 7), strict=True))
    assert [devices_along(name, sizes) for name in ("batch", "seq", "heads")] == [6, 5, 7]
    assert devices_along("residual_seq", sizes) == 35
    assert devices_along("embed", sizes) == 1
    assert weight_shards(sizes) == 15
    assert devices_along("batch") == 1  # without a mesh
    with jax.set_mesh(mesh_of((2, 2, 1, 2))):
        assert [devices_along(name) for name in ("batch", "seq", "vocab")] == [4, 1, 2]


def test_constrain_without_a_mesh_does_nothing():
    x = jnp.zeros((2, 3))
    assert constrain(x, "batch", "seq") is x


def test_the_lowered_step_pins_activations():
    mesh = mesh_of((2, 2, 1, 2))
    batch = random_batch(TINY, 0)
    with jax.set_mesh(mesh):
        step = jax.jit(lambda s, b: train_step(s, b, config=TINY))
        text = step.lower(abstract_state(TINY), batch).as_text()
    found = re.findall(r"sdy.sharding_constraint .*? <@\w+, (\[.*?\])> : tensor<(.*?)>", text)
    pinned = {(spec, shape) for spec, shape in found}
    rows = '{"data", "fsdp"}, {"context"}'
    assert (f"[{{{rows[1:]}, {{}}]", "32x16x32xf32") in pinned  # residual stream
    assert (f'[{{{rows[1:]}, {{"tensor"}}, {{}}]', "32x16x4x8xf32") in pinned  # q, k, v
    assert (f'[{{{rows[1:]}, {{"tensor"}}]', "32x16x48xf32") in pinned  # SwiGLU
    # Logits of a chunk, for the rows of one device.
    assert ('[{}, {}, {"tensor"}]', "8x8x64xf32") in pinned


def trace_step(config, mesh):
    """Returns the step's jaxpr, its abstract state and its outputs, without any device."""
    shape = (config.train.global_batch, config.train.seq_len)
    batch = {
        "inputs": jax.ShapeDtypeStruct(shape, jnp.int32),
        "targets": jax.ShapeDtypeStruct(shape, jnp.int32),
        "weights": jax.ShapeDtypeStruct(shape, jnp.float32),
    }
    with jax.sharding.use_abstract_mesh(mesh):
        state = abstract_state(config)
        make = jax.make_jaxpr(lambda s, b: train_step(s, b, config=config), return_shape=True)
        jaxpr, (after, metrics) = make(state, batch)
    return jaxpr, state, after, metrics


def test_65b_on_2048_devices_without_one():
    config, _ = load("65b")
    mesh = abstract_mesh(1, 512, 1, 4)
    jaxpr, state, after, metrics = trace_step(config, mesh)
    specs = param_specs(state.params, mesh)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()

    def local(leaf, spec):
        parts = math.prod(mesh.shape[a] for entry in spec for a in sharding.mesh_axes(entry))
        return math.prod(leaf.shape) / parts

    per_device = sum(
        map(
            local,
            jax.tree.leaves(state.params),
            jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
        )
    )
    # Only the norms' scales (1.3M) are whole on each device.
    assert per_device == pytest.approx(65_285_660_672 / 2048, rel=0.05)
    # A deeper model takes no longer to trace and compile.
    shallow, *_ = trace_step(replace(config, model__n_layers=2), mesh)
    assert len(str(jaxpr).splitlines()) == len(str(shallow).splitlines())


def test_check_batch():
    mesh = abstract_mesh(2, 2, 2, 1)
    sharding.check_batch(8, 16, 2, mesh)
    with pytest.raises(UserError, match="global_batch=8 / train.grad_accum=4 = 2 sequences"):
        sharding.check_batch(8, 16, 4, mesh)
    with pytest.raises(UserError, match="seq_len=15 does not divide into two chunks"):
        sharding.check_batch(8, 15, 2, mesh)
    with pytest.raises(UserError, match="seq_len=4 .* over context x tensor = 8 devices"):
        sharding.check_batch(8, 4, 2, abstract_mesh(1, 1, 2, 4))


# Compiles the train and the evaluation step; warnings of the partitioner go to standard error.
COMPILE = """
import sys
import jax
from llama_jax.model import llama
from llama_jax.train.step import abstract_state, jit_step
from tests.helpers import ROOT, TINY, mesh_of, random_batch, replace

changes, packed, unpinned, shapes = eval(sys.argv[1])
config = replace(TINY, **changes)
if unpinned:
    llama.reshard = lambda x, names, gradient_names: llama.constrain(x, *names)
batch = random_batch(config, 0)
if packed:
    batch |= {"positions": batch["inputs"], "segment_ids": batch["inputs"]}
for shape in shapes:
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
        step, state = jit_step(config, mesh), abstract_state(config)
        print("mesh", shape, file=sys.stderr, flush=True)
        step.train.lower(state, batch).compile()
        step.evaluate.lower(state.params, batch).compile()
"""


def rematerialized(shapes, unpinned=False, packed=False, **changes):
    """Returns the meshes on which the partitioner can only reshard by replicating a whole array."""
    process = subprocess.run(
        [sys.executable, "-c", COMPILE, repr((changes, packed, unpinned, shapes))],
        cwd=ROOT,
        env={
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "1",  # warnings, which the other tests hide
            "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from the cache gives no warnings
            # The partitioner is the same; the optimizations after it are not needed here.
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {QUICK}",
        },
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert process.returncode == 0, process.stderr
    parts = process.stderr.split("mesh (")[1:]
    assert len(parts) == len(shapes), process.stderr
    found = zip(shapes, parts, strict=True)
    return [shape for shape, part in found if "nvoluntary full rematerialization" in part]


def test_no_intermediate_is_unsharded():
    assert rematerialized(((1, 8, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 2, 4))) == []


def test_an_unsharded_intermediate_is_seen():
    """Without a sharding for gradients of the residual stream, one of them is replicated."""
    shapes = ((1, 1, 2, 4),)
    assert rematerialized(shapes, unpinned=True) == list(shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"train__grad_accum": 4, "model__remat": "full", "model__compute_dtype": "bfloat16"},
        {"model__tied_embeddings": True, "model__n_kv_heads": 2, "model__remat": "dots"},
        {"packed": True, "model__sliding_window": 8, "train__z_loss": 0.1},
    ],
)
def test_no_intermediate_of_other_steps_is_unsharded(changes):
    shapes = ((8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 1, 4), (2, 2, 1, 2), (1, 2, 2, 2), (1, 1, 8, 1))
    if changes.get("model__n_kv_heads") == 2:
        shapes = tuple(shape for shape in shapes if shape[3] < 4)
    assert rematerialized(shapes, **changes) == []
