"""The model and optimizer agree with `transformers.LlamaForCausalLM` and torch's AdamW.

By default they are compared with goldens from `make_goldens.py`; `make parity` computes these anew.
"""

import functools

import jax
import numpy as np
import pytest

from llama_jax.model.llama import logits
from llama_jax.train.optimizer import make_optimizer
from llama_jax.train.step import TrainState, _gradients, jit_step
from tests.helpers import ROOT, TINY, mesh_of, random_batch, random_params, replace

STEPS = 20
BASE = replace(
    TINY,
    optim__peak_lr=2e-3,
    optim__warmup_steps=5,
    train__steps=STEPS,
    train__global_batch=4,
    train__seq_len=16,
)
CASES = {
    "llama": BASE,
    "grouped": replace(
        BASE, model__n_kv_heads=2, model__rope_theta=500_000.0, model__norm_eps=1e-5
    ),
    "tied": replace(BASE, model__n_kv_heads=1, model__tied_embeddings=True),
}


@functools.cache
def golden(name):
    with np.load(ROOT / "tests" / "goldens" / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def live(name):
    from tests.reference import hf_reference

    config, params = CASES[name], random_params(CASES[name].model)
    batches = [random_batch(config, step) for step in range(STEPS)]
    expected, grads = hf_reference.logits_and_gradients(config.model, params, batches[0])
    losses = hf_reference.adamw_losses(config, params, batches)
    return {"logits": expected, "losses": losses, **grads}


def to_hf_names(config, tree):
    """Returns our gradients under transformers' names; a copy of the mapping, without torch."""
    layers, dim = tree["layers"], config.dim
    out = {"model.embed_tokens.weight": tree["embed"], "model.norm.weight": tree["final_norm"]}
    if "lm_head" in tree:
        out["lm_head.weight"] = tree["lm_head"].T
    table = {
        "self_attn.q_proj": layers["attn"]["wq"].reshape(config.n_layers, dim, -1),
        "self_attn.k_proj": layers["attn"]["wk"].reshape(config.n_layers, dim, -1),
        "self_attn.v_proj": layers["attn"]["wv"].reshape(config.n_layers, dim, -1),
        "self_attn.o_proj": layers["attn"]["wo"].reshape(config.n_layers, -1, dim),
        "mlp.gate_proj": layers["mlp"]["w1"],
        "mlp.up_proj": layers["mlp"]["w3"],
        "mlp.down_proj": layers["mlp"]["w2"],
    }
    for i in range(config.n_layers):
        for name, value in table.items():
            out[f"model.layers.{i}.{name}.weight"] = value[i].T
        out[f"model.layers.{i}.input_layernorm.weight"] = layers["attn_norm"][i]
        out[f"model.layers.{i}.post_attention_layernorm.weight"] = layers["mlp_norm"][i]
    return out


@pytest.fixture(
    params=[golden, pytest.param(live, marks=pytest.mark.parity)], ids=["golden", "live"]
)
def reference(request):
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_logits(name, reference):
    config = CASES[name]
    expected = reference(name)["logits"]
    got = logits(config.model, random_params(config.model), random_batch(config, 0)["inputs"])
    assert 3 < np.abs(expected).max() < 30
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name, reference):
    config = CASES[name]
    params, batch = random_params(config.model), random_batch(config, 0)
    _, grads = jax.jit(lambda p, b: _gradients(p, b, config))(params, batch)
    got = to_hf_names(config.model, jax.device_get(grads))
    expected = {n: g for n, g in reference(name).items() if n not in ("logits", "losses")}
    assert set(got) == set(expected)
    for path, want in expected.items():
        np.testing.assert_allclose(got[path], want, rtol=0, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_of_adamw(name, reference):
    config = CASES[name]
    mesh = mesh_of((1, 1, 1, 1))
    with jax.set_mesh(mesh):
        compiled = jit_step(config, mesh)
        params = jax.device_put(random_params(config.model), compiled.state_shardings.params)
        opt_state = make_optimizer(config.optim, STEPS).init(params)
        state = TrainState(step=jax.numpy.zeros((), "int32"), params=params, opt_state=opt_state)
        losses = []
        for step in range(STEPS):
            state, metrics = compiled.train(state, random_batch(config, step))
            losses.append(float(metrics["loss"]))
    expected = reference(name)["losses"]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)
    assert np.ptp(expected) > 0.1


def interleaved(params):
    """Returns the weights as for Meta's pairing of dimensions (2i, 2i + 1)."""
    order = np.arange(8).reshape(2, 4).T.reshape(-1)
    attn = dict(params["layers"]["attn"])
    attn["wq"], attn["wk"] = attn["wq"][..., order], attn["wk"][..., order]
    return {**params, "layers": {**params["layers"], "attn": attn}}


@pytest.mark.parametrize(
    ("changes", "transform"),
    [
        ({}, interleaved),
        ({"model__norm_eps": 1e-2}, lambda params: params),
        ({"model__rope_theta": 20_000.0}, lambda params: params),
    ],
    ids=["interleaved RoPE", "eps", "theta"],
)
def test_a_wrong_convention_shows(changes, transform):
    config = CASES["llama"]
    params = transform(random_params(config.model))
    wrong = replace(config, **changes)
    got = logits(wrong.model, params, random_batch(config, 0)["inputs"])
    assert np.abs(got - golden("llama")["logits"]).max() > 1e-2
