"""Adapters: what they compute, what is trained, where it is placed, what a run keeps of it."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint.fingerprint import fingerprint
from llama_jax.config import LoraConfig
from llama_jax.model.cost import adapter_count
from llama_jax.model.llama import logits
from llama_jax.model.lora import Adapted, init_adapters, merge
from llama_jax.model.weights import abstract_frozen
from llama_jax.plan.compilation import compile_step
from llama_jax.train.step import _dropout_key, _gradients, abstract_state, model_weights
from tests.helpers import (
    MESHES,
    ROOT,
    TINY,
    frozen_base,
    mesh_of,
    random_adapters,
    random_batch,
    random_params,
    replace,
    shared_step,
)

STEPS = 4
# All matrices have at least 64 inputs, because NF4 has blocks of 64.
SMALL = replace(
    TINY,
    model__dim=64,
    model__ffn_dim=128,
    init_from="hf:there",
    lora=LoraConfig(rank=4, alpha=8.0, base_dtype="float32"),
)
PEFT_CASES = {
    "all": replace(TINY, init_from="hf:there", lora=SMALL.lora, train__global_batch=4),
    "some": replace(
        TINY,
        init_from="hf:there",
        model__n_kv_heads=2,
        lora=LoraConfig(rank=2, alpha=3.0, targets="wq,wv,w2", base_dtype="float32"),
        train__global_batch=4,
    ),
}


def peft_golden(name):
    with np.load(ROOT / "tests" / "goldens" / f"lora_{name}.npz") as file:
        return dict(file)


def peft_live(name):
    from tests.reference import peft_reference

    config = PEFT_CASES[name]
    logits, loss, grads = peft_reference.logits_loss_gradients(
        config, random_params(config.model), random_adapters(config), random_batch(config, 0)
    )
    return {"logits": logits, "loss": loss, **grads}


def peft_names(config, adapters):
    """Returns our adapters under PEFT's names and shapes; a copy of the mapping, without torch."""
    table = {
        **{"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj"},
        **{"wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj"},
        "w3": "mlp.up_proj",
    }
    out, rank = {}, config.lora.rank
    for group in adapters["layers"].values():
        for name, adapter in group.items():
            for layer in range(config.model.n_layers):
                prefix = f"base_model.model.model.layers.{layer}.{table[name]}"
                a, b = adapter["a"][layer], adapter["b"][layer]
                out[f"{prefix}.lora_A.default.weight"] = a.reshape(-1, rank).T
                out[f"{prefix}.lora_B.default.weight"] = b.reshape(rank, -1).T
    return out


@pytest.mark.parametrize(
    "reference",
    [peft_golden, pytest.param(peft_live, marks=pytest.mark.parity)],
    ids=["golden", "live"],
)
@pytest.mark.parametrize("name", PEFT_CASES)
def test_logits_loss_and_gradients_are_those_of_peft(name, reference):
    config, expected = PEFT_CASES[name], reference(name)
    base = frozen_base(config, random_params(config.model))
    adapters, batch = random_adapters(config), random_batch(config, 0)
    got = logits(config.model, Adapted(base, adapters, config.lora), batch["inputs"])
    plain = logits(config.model, base, batch["inputs"])
    assert np.abs(plain - expected["logits"]).max() > 1  # the adapters make a difference
    np.testing.assert_allclose(got, expected.pop("logits"), rtol=0, atol=1e-4)
    (_, loss, _), grads = jax.jit(lambda a: _gradients(a, batch, config, base))(adapters)
    assert float(loss) == pytest.approx(float(expected.pop("loss")), abs=1e-4)
    found = peft_names(config, jax.device_get(grads))
    assert set(found) == set(expected)
    for path, want in expected.items():
        np.testing.assert_allclose(found[path], want, rtol=0, atol=1e-4, err_msg=path)


def test_merged_is_unmerged():
    config = PEFT_CASES["all"]
    both = random_params(config.model), random_adapters(config)
    # These weights give logits of about 1.
    params, adapters = jax.tree.map(lambda x: x * np.float32(0.7), both)
    tokens = random_batch(config, 0)["inputs"]
    merged = merge(params, adapters, config.lora)
    unmerged = logits(config.model, Adapted(params, adapters, config.lora), tokens)
    got, plain = (logits(config.model, weights, tokens) for weights in (merged, params))
    assert 0.5 < unmerged.std() < 2 and np.abs(plain - unmerged).max() > 1
    np.testing.assert_allclose(got, unmerged, rtol=0, atol=1e-5)


def test_a_fresh_adapter_changes_nothing_and_is_drawn_as_peft_draws_it():
    config = SMALL
    adapters = init_adapters(config.model, config.lora, jax.random.key(0))
    params, tokens = random_params(config.model), random_batch(config, 0)["inputs"]
    adapted = Adapted(params, adapters, config.lora)
    assert (logits(config.model, adapted, tokens) == logits(config.model, params, tokens)).all()
    for name, bound in [("wq", 64**-0.5), ("wo", 64**-0.5)]:
        a = np.asarray(adapters["layers"]["attn"][name]["a"])
        assert bound * 0.98 < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    a = np.asarray(adapters["layers"]["mlp"]["w2"]["a"])
    assert 128**-0.5 * 0.98 < np.abs(a).max() <= 128**-0.5
    assert adapter_count(config.model, config.lora) == sum(
        x.size for x in jax.tree.leaves(adapters)
    )


def test_only_targets_have_adapters():
    lora = LoraConfig(rank=2, targets="w3,wq")
    layers = init_adapters(SMALL.model, lora, jax.random.key(0))["layers"]
    assert {group: set(found) for group, found in layers.items()} == {"attn": {"wq"}, "mlp": {"w3"}}


def packed_batch(config, seed):
    """Returns a random batch with three packed documents per row, and padding."""
    batch, rng = random_batch(config, seed), np.random.default_rng(seed)
    rows, length = batch["inputs"].shape
    segments, positions = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        starts = [0, *np.sort(rng.choice(np.arange(1, length), 3, replace=False)), length]
        for number, (start, stop) in enumerate(itertools.pairwise(starts)):
            segments[row, start:stop] = (number + 1) % 4  # the last part is padding, 0
            positions[row, start:stop] = np.arange(stop - start)
    weights = batch["weights"] * (segments > 0)
    return {**batch, "weights": weights, "segment_ids": segments, "positions": positions}


@functools.cache
def compiled_step(config, shape):
    with jax.set_mesh(mesh_of(shape)):
        return shared_step(config, mesh_of(shape))


def small(weights):
    """Scales weights down, so that rounding changes no loss visibly."""
    return jax.tree.map(lambda x: x * np.float32(0.3), weights)


def run(config, shape=(1, 1, 1, 1), steps=STEPS):
    """Trains on packed documents; returns the losses and the last state."""
    base = frozen_base(config, small(random_params(config.model)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_state(config))
    state = dataclasses.replace(zeros, params=small(random_adapters(config)), frozen=base)
    with jax.set_mesh(mesh_of(shape)):
        compiled = compiled_step(config, shape)
        state = jax.device_put(state, compiled.state_shardings)
        losses = []
        for step in range(steps):
            batch = jax.device_put(packed_batch(config, step), compiled.batch_sharding)
            state, metrics = compiled.train(state, batch)
            losses.append(float(metrics["loss"]))
        return np.array(losses), state


def all_losses(config, shape=(1, 1, 1, 1)):
    """Returns the losses of `run`, followed by a validation loss."""
    losses, state = run(config, shape)
    with jax.set_mesh(mesh_of(shape)):
        compiled = compiled_step(config, shape)
        batch = jax.device_put(packed_batch(config, 0), compiled.batch_sharding)
        total, weight = compiled.evaluate(model_weights(state, config), batch)
    return np.append(losses, total / weight)


KINDS = {
    "float32": SMALL,
    "nf4": replace(SMALL, lora__base_dtype="nf4", model__remat="full"),
    "dropout": replace(SMALL, lora__dropout=0.3, train__grad_accum=2),
}
# Its blocks of 64 inputs divide over every mesh.
WIDE = replace(KINDS["nf4"], model__dim=512, model__ffn_dim=256)


@functools.cache
def unsharded(config):
    return all_losses(config)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        # By default only NF4 is tested, because the adapters do not depend on the kind of base.
        (kind, shape)
        if shape == (1, 2, 2, 2) and kind == "nf4"
        else pytest.param(kind, shape, marks=pytest.mark.slow)
        for kind, shape in itertools.product(KINDS, MESHES[1:])
    ],
)
def test_losses_are_the_same_on_every_mesh(kind, shape):
    config = WIDE if kind == "nf4" else KINDS[kind]
    losses = all_losses(config, shape)
    np.testing.assert_allclose(losses, unsharded(config), rtol=0, atol=2e-5)
    assert abs(losses[0] - losses[-1]) > 1e-2  # the same documents, before and after training


def test_documents_of_a_row_are_apart():
    """Document ids matter in the batches above: without them, the losses differ."""
    config = SMALL
    base, adapters = random_params(config.model), random_adapters(config)
    batch = packed_batch(config, 0)
    plain = {name: x for name, x in batch.items() if name != "segment_ids"}

    @jax.jit
    def loss(batch):
        return _gradients(adapters, batch, config, base)[0][1]

    assert abs(float(loss(batch)) - float(loss(plain))) > 1e-2


def test_initial_adapters_are_the_same_bits_on_every_mesh():
    found = []
    for shape in [(1, 1, 1, 1), (1, 2, 2, 2)]:
        mesh = mesh_of(shape)
        with jax.set_mesh(mesh):
            compiled = shared_step(SMALL, mesh)
            found.append(fingerprint(compiled.init(jax.random.key(0)).params))
    assert found[0] == found[1]


def test_only_adapters_are_trained_and_have_moments():
    config = KINDS["nf4"]
    base = frozen_base(config, small(random_params(config.model)))
    _, state = run(config, steps=1)
    adapters = jax.tree.structure(state.params)
    adam = [part for part in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(part)]
    assert [jax.tree.structure(part.mu) for part in adam] == [adapters]
    assert [jax.tree.structure(part.nu) for part in adam] == [adapters]
    elements = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert elements == 2 * adapter_count(config.model, config.lora) + 2  # and two counters
    for got, want in zip(jax.tree.leaves(state.frozen), jax.tree.leaves(base), strict=True):
        assert got.dtype == want.dtype and (np.asarray(got) == want).all()
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(state.params))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_matrices_in_nf4_are_no_stack_of_floats(remat):
    """The step is compiled as `plan` does; the reported size of the base is that of NF4."""
    config = replace(KINDS["nf4"], model__n_layers=3, model__remat=remat)
    compiled = compile_step(config, jax.devices()[:1])
    base = jax.tree.leaves(abstract_frozen(config))
    assert compiled.bytes["frozen"] == sum(x.size * x.dtype.itemsize for x in base)
    assert compiled.bytes["parameters"] == 4 * adapter_count(config.model, config.lora)
    assert "u8[3,32,128]" in compiled.text and "f32[64,128]" in compiled.text
    # Adapters have other shapes, such as 3,64,4.
    for shape in ("3,64,128", "3,128,64", "3,64,4,16", "3,4,16,64"):
        assert f"f32[{shape}]" not in compiled.text


def _is_adam(part):
    return hasattr(part, "mu")


def test_rows_of_adapters_follow_from_their_matrix():
    mesh = mesh_of((1, 2, 1, 4))
    shardings = shared_step(KINDS["float32"], mesh).state_shardings
    shard, P = ("fsdp", "context"), jax.P
    specs = jax.tree.map(lambda x: x.spec, shardings.params["layers"])
    assert specs["attn"]["wq"] == {"a": P(None, shard, None), "b": P(None, None, "tensor", None)}
    assert specs["attn"]["wo"] == {"a": P(None, "tensor", None, None), "b": P(None, None, shard)}
    assert specs["mlp"]["w2"] == {"a": P(None, "tensor", None), "b": P(None, None, shard)}
    wide = replace(KINDS["nf4"], model__dim=256, model__ffn_dim=256)
    frozen = shared_step(wide, mesh).state_shardings.frozen["layers"]
    assert frozen["attn"]["wo"].codes.spec == P(None, "tensor", shard)
    assert frozen["mlp"]["w1"].scales.spec == P(None, shard, "tensor")
    assert frozen["mlp"]["w1"].groups.spec == P()


def test_dropout_is_of_the_seed_the_step_and_the_microbatch():
    config = KINDS["dropout"]
    first = run(config)[0]
    assert (first == run(config)[0]).all()
    assert run(replace(config, train__seed=1), steps=1)[0] != first[0]
    # The same batch at another step, or as another microbatch, has other masks.
    base, adapters = frozen_base(config, random_params(config.model)), random_adapters(config)
    half = {name: x[:16] for name, x in random_batch(config, 0).items()}
    twice = {name: np.repeat(x, 2, axis=0) for name, x in half.items()}

    @functools.partial(jax.jit, static_argnums=0)
    def loss(config, batch, step):
        key = _dropout_key(config, step)
        return _gradients(adapters, batch, config, base, key)[0][1]

    plain = replace(config, train__grad_accum=1)
    losses = [float(loss(plain, half, step)) for step in (0, 1)]
    assert abs(losses[0] - losses[1]) > 1e-4
    assert abs(float(loss(config, twice, 0)) - losses[0]) > 1e-4
