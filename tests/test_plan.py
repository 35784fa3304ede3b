import json
import os
import re

import jax
import pytest

from llama_jax import plan as plan_lib
from llama_jax.chips import CHIPS, chip_named, find_chip
from llama_jax.errors import UserError
from llama_jax.hlo import Summary
from llama_jax.plan import Topology, parse_topology, plan, predict, table
from llama_jax.step import abstract_state
from tests.helpers import TINY, one_line_error, replace, run_command
from tests.test_config import load


@pytest.mark.parametrize(
    ("name", "chip", "shape"),
    [
        ("v5p-1024", "v5p", (8, 8, 8)),
        ("v5p-128", "v5p", (4, 4, 4)),
        ("v5p-2048", "v5p", (8, 8, 16)),
        ("v4-2048", "v4", (8, 8, 16)),
        ("v4-512", "v4", (4, 8, 8)),
        ("v5e-256", "v5e", (16, 16)),
        ("v6e-32", "v6e", (4, 8)),
        ("v5p:8x8x4", "v5p", (8, 8, 4)),
    ],
)
def test_names_of_slices(name, chip, shape):
    topology = parse_topology(name)
    assert (topology.chip.name, topology.shape) == (chip, shape)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9-256", "unknown topology 'v9-256'; try v5p-1024"),
        ("h100:8", "unknown topology"),
        ("v5p", "unknown topology"),
        ("v5p:8x8", "a slice of v5p has 3 dimensions"),
        ("v5e:4x4x4", "a slice of v5e has 2 dimensions"),
        ("v5p:8x0x8", "has 3 dimensions"),
        ("v5p-7", "there is no slice v5p-7"),
        ("v4-200", "there is no slice v4-200"),
    ],
)
def test_slices_that_do_not_exist(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_topology(name)


def test_the_table_of_chips():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert chip_named("h100").peak_flops == 989e12
    assert find_chip("TPU v5 lite").name == "v5e" and find_chip("TPU v5p").name == "v5p"
    assert find_chip("cpu") is None and chip_named("v9") is None


CONFIG = replace(TINY, train__global_batch=32, mesh__tensor=2)


@pytest.fixture
def eight(monkeypatch):
    """Eight CPU devices in the place of a v5e slice."""
    monkeypatch.setattr(plan_lib, "topology_devices", lambda topology: jax.devices())
    return Topology(chip_named("v5e"), (2, 4))


def test_the_plan_counts_what_is_there(eight):
    result = plan(CONFIG, eight)
    assert result["chips"] == 8 and result["mesh"]["fsdp"] == 4
    assert json.loads(json.dumps(result)) == result
    state = abstract_state(CONFIG)
    matrices = sum(leaf.size for leaf in jax.tree.leaves(state.params)) - 5 * 32
    # Weights and two moments over 8 devices, norms and counters whole, tokens over 4.
    expected = 3 * 4 * (matrices / 8 + 5 * 32) + 3 * 4 * 32 * 16 / 4 + 12
    sizes = result["bytes_per_chip"]
    assert sizes["arguments"] == pytest.approx(expected, rel=0.01)
    assert sizes["total"] == sizes["arguments"] + sizes["temporaries"]
    assert sizes["capacity"] == 16 * 2**30 and result["fits"]
    assert result["collectives"]["all-gather"]["count"] > CONFIG.model.n_layers
    rate = result["tokens_per_second_per_chip"]
    assert rate == pytest.approx(CONFIG.train.tokens_per_step / 8 / result["step_seconds"])
    assert result["mfu_6n"] == pytest.approx(
        6 * CONFIG.model.parameter_count() * rate / eight.chip.peak_flops
    )
    assert result["chip_hours"] == pytest.approx(
        CONFIG.train.steps * result["step_seconds"] * 8 / 3600
    )
    text = table(result)
    assert "fits         yes" in text and "v5e:2x4: 8 chips" in text


def test_what_does_not_fit_says_what_would_help(eight, monkeypatch):
    result = plan(CONFIG, eight)
    result["fits"] = False
    result["bytes_per_chip"]["capacity"] = 1000
    assert "NO, " in table(result) and "take more chips" in table(result)


def test_a_mesh_that_does_not_divide(eight):
    with pytest.raises(UserError, match="does not cover 8 devices"):
        plan(replace(CONFIG, mesh__tensor=3), eight)


def test_prediction_by_hand():
    config, _ = load("7b")
    chip = chip_named("v5p")
    tokens = config.train.tokens_per_step / 64
    flops = config.model.flops_per_token(2048) * tokens * 4 / 3  # full remat: forward twice
    summary = Summary({"all-reduce": (10, 600 * 10**9)}, cycles=int(1.75e9 * 9))
    found = predict(config, chip, 64, summary)
    assert found.flops == pytest.approx(flops)
    assert found.compute == pytest.approx(flops / 459e12)
    assert found.network == pytest.approx(2.0)
    attention = 6 * 32 * 4096 * 2048 * tokens * 4 / 3
    assert found.cycles == pytest.approx(9 + attention / (0.5 * 459e12))
    assert found.step == found.cycles > found.compute
    without = predict(config, chip, 64, Summary({}, 0))
    assert without.cycles is None and without.step == without.compute


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--config=configs/7b.py",), "--topology is missing"),
        (("--topology=v5p-128",), "--config is missing"),
        (("--config=configs/7b.py", "--topology=v9-1"), "unknown topology"),
    ],
)
def test_the_command_with_bad_input(flags, message):
    assert message in one_line_error(run_command("plan", *flags))


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("name", "topology", "flags"), [("7b", "v5p-128", ()), ("65b", "v5p-1024", ())]
)
def test_the_real_compiler_says_that_it_fits(name, topology, flags):
    os.environ.pop("XLA_FLAGS", None)
    arguments = (f"--config=configs/{name}.py", f"--topology={topology}", "--json", *flags)
    process = run_command("plan", *arguments, timeout=900)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["fits"]
    state = 12 * result["parameters"] / result["chips"]
    assert result["bytes_per_chip"]["arguments"] == pytest.approx(state, rel=0.03)
    assert 0.3 < result["mfu_6n"] < 0.9
    assert result["compile_seconds"] < 300
