import re
import types

import optax
import pytest

from llama_jax.config import LoraConfig, OptimConfig
from llama_jax.data.source import BatchSource
from llama_jax.model.cost import flops_by_part, flops_per_token
from llama_jax.train.overview import overview
from llama_jax.train.parts import Parts
from llama_jax.train.schedule import make_schedule
from tests.helpers import TINY, mesh_of, replace, with_adapters


def test_the_flops_of_a_step_by_part():
    config = replace(TINY, train__steps=10)
    train = BatchSource()
    train.epochs = lambda step: {"": 0.5}
    text = overview(config, mesh_of((1, 8, 1, 1)), types.SimpleNamespace(train=train))
    rows = {
        name: (float(token), float(step), float(share))
        for name, token, step, share in re.findall(
            r"^ {8}(\w[\w ]+?) +([\d.e+]+) +([\d.e+]+) +([\d.]+)%$", text, re.M
        )
    }
    parts = flops_by_part(config.model, config.lora, 16)
    assert list(rows) == [*parts, "total"]
    for name, flops in parts.items():
        assert rows[name][0] == float(f"{flops:.2e}")
        assert rows[name][1] == float(f"{flops * 32 * 16:.2e}")
    assert rows["total"][0] == float(f"{flops_per_token(config.model, config.lora, 16):.2e}")
    assert rows["total"][2] == 100
    assert abs(sum(share for _, _, share in rows.values()) - 200) < 0.3
    assert "6 per weight" in text and "causal half" in text
    assert "data    epochs at the end: the source 0.50" in text


def test_adapters_and_their_base_are_told():
    config = with_adapters(replace(TINY, train__steps=10))
    train = BatchSource()
    text = overview(config, mesh_of((1, 1, 1, 1)), types.SimpleNamespace(train=train))
    count = 2 * 2 * (4 * 2 * 32 + 3 * (32 + 48))  # layers, rank, inputs and outputs
    assert f"LoRA    {count:,} parameters are trained: rank 2 for wq,wk,wv,wo,w1,w2,w3" in text
    assert "base    hf:there, frozen in bfloat16" in text and "4 per frozen one" in text
    parts = flops_by_part(config.model, LoraConfig(), 16)
    frozen = sum(parts.values()) - parts["attention scores"]
    total = frozen * 4 / 6 + parts["attention scores"] + 6 * count
    assert f"{total * 10 * 32 * 16:.2e} FLOPs" in text
    assert "begin   hf:there" in overview(
        replace(TINY, init_from="hf:there"),
        mesh_of((1, 1, 1, 1)),
        types.SimpleNamespace(train=train),
    )


def rate_lines(optim, steps, parts=()):
    """Returns the lines of an overview on the learning rate."""
    config = replace(TINY, train__steps=steps, optim=optim)
    data = types.SimpleNamespace(train=BatchSource())
    lines = overview(config, mesh_of((1, 1, 1, 1)), data, *parts).splitlines()
    return [line for line in lines if line.startswith("rate")]


@pytest.mark.parametrize(
    ("fields", "after"),
    [
        ({}, "cosine to 3.00e-05 at step 1,000"),
        ({"schedule": "linear"}, "linear to 3.00e-05 at step 1,000"),
        ({"schedule": "constant"}, "constant"),
        ({"schedule": "inverse_sqrt"}, "inverse_sqrt to 9.49e-05 at step 1,000"),
        ({"schedule": "wsd"}, "wsd: 1-sqrt to 3.00e-05 over the last 200 steps"),
        (
            {"schedule": "wsd", "decay_steps": 30, "decay_shape": "linear"},
            "wsd: linear to 3.00e-05 over the last 30 steps",
        ),
    ],
)
def test_the_learning_rate_is_described(fields, after):
    optim = OptimConfig(3e-4, warmup_steps=100, **fields)
    assert rate_lines(optim, 1000) == [f"rate    3.00e-04 after 100 steps, then {after}"]
    last = float(make_schedule(optim, 1000)(1000))
    assert f" {last:.2e} " in (" 3.00e-04 " if after == "constant" else after)


def test_a_rate_without_a_warm_up_or_of_a_ready_made_optimizer():
    optim = OptimConfig(3e-4, warmup_steps=0, schedule="inverse_sqrt")
    line = "rate    3.00e-04 from the first step, then inverse_sqrt to 3.00e-05 at step 100"
    assert rate_lines(optim, 100) == [line]
    assert rate_lines(optim, 100, [Parts(optimizer=optax.lion)]) == [line]
    assert rate_lines(optim, 100, [Parts(optimizer=optax.lion(1e-3))]) == []
