import dataclasses

import jax
import pytest

from llama_jax import plan as plan_lib
from llama_jax import search as search_lib
from llama_jax.chips import chip_named
from llama_jax.errors import UserError
from llama_jax.lora import frozen_bytes
from llama_jax.search import advice, candidates, estimate, options, search, what_divides
from llama_jax.step import abstract_frozen
from llama_jax.topology import Topology, parse_topology
from tests import plans
from tests.helpers import TINY, replace
from tests.test_config import load

EIGHT = Topology(chip_named("v5e"), (2, 4))
CONFIG = replace(TINY, train__global_batch=32)


@pytest.mark.parametrize("home", plans.HOMES, ids=lambda home: home.name)
def test_the_estimate_is_near_the_compiler(home):
    """Within a factor of two in memory and time: enough to sort by."""
    config, _ = load(home.config)
    changes = {}
    for flag in home.flags:
        if flag.startswith("--config."):
            name, value = flag.removeprefix("--config.").split("=", 1)
            changes[name.replace(".", "__")] = int(value) if value.isdigit() else value
    guess = estimate(replace(config, **changes), parse_topology(home.topology))
    stored = plans.golden(home)
    assert guess.total / 2**30 == pytest.approx(stored["gib_per_chip"]["total"], rel=0.5)
    assert guess.seconds == pytest.approx(stored["step_seconds"], rel=0.5)


def test_candidates_divide():
    found = list(candidates(CONFIG, EIGHT))
    meshes = {dataclasses.astuple(one.mesh) for one in found}
    assert (1, 8, 1, 1) in meshes and (2, 2, 1, 2) in meshes
    assert all(one.mesh.tensor <= 4 for one in found)  # four heads
    assert {one.model.remat for one in found} >= {"full", "none"}
    for one in found:
        rows = one.mesh.data * one.mesh.fsdp
        assert rows * one.mesh.tensor == 8
        assert one.train.global_batch % (one.train.grad_accum * rows) == 0


def test_the_estimate_knows_what_saves_memory():
    def total(**changes):
        return estimate(replace(CONFIG, **changes), EIGHT).total

    assert total(model__remat="full") < total(model__remat="save:q,k") < total(model__remat="none")
    assert total(train__grad_accum=4) < total()
    assert total(mesh__fsdp=8) < total(mesh__data=8, mesh__fsdp=1)


ADAPTERS = {"init_from": "hf:there", "lora__rank": 16, "train__seq_len": 512}
ADAPTERS |= {"train__global_batch": 40, "model__remat": "full"}


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", "nf4"])
def test_the_estimate_of_adapters_is_of_a_frozen_base(base_dtype):
    """Which is known to the byte; weights that are trained take 16 bytes and more."""
    config = replace(load("7b")[0], **ADAPTERS, lora__base_dtype=base_dtype)
    base = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_frozen(config)))
    assert frozen_bytes(config.model, config.lora) == pytest.approx(base, rel=1e-3)
    one = parse_topology("h100:1x1")
    total = estimate(replace(config, train__grad_accum=40), one).total
    assert base < total < base + 2 * 2**30
    # Half as much is left on two GPUs, but for what each of them works on.
    assert estimate(replace(config, train__grad_accum=20), parse_topology("h100:1x2")).total < total


def test_the_time_of_adapters():
    """4 FLOPs a weight in place of 6; NF4 costs that each microbatch unpacks the base again."""
    config, one = replace(load("7b")[0], **ADAPTERS), parse_topology("h100:1x1")
    full = estimate(replace(config, lora__rank=0), one).seconds
    frozen = estimate(config, one).seconds
    assert frozen / full == pytest.approx(4 / 6 * (1 + 0.7 / 2) / (1 + 0.7 / 3), rel=0.02)
    packed = replace(config, lora__base_dtype="nf4")
    costs = [
        estimate(replace(packed, train__grad_accum=count), one).seconds - frozen for count in (1, 8)
    ]
    assert costs[1] == pytest.approx(8 * costs[0], rel=0.01) and costs[0] > 0


def test_candidates_divide_the_blocks_of_nf4():
    config = replace(load("7b")[0], **ADAPTERS)
    config = replace(config, train__global_batch=4096)
    machine = parse_topology("h100:16x8")

    def sizes(base_dtype):
        found = candidates(replace(config, lora__base_dtype=base_dtype), machine)
        return {(one.mesh.fsdp, one.mesh.tensor) for one in found}

    # 4096 / 64 inputs over fsdp, 11008 / 64 over tensor.
    assert max(fsdp for fsdp, _ in sizes("nf4")) == 64
    assert {tensor for _, tensor in sizes("nf4")} == {1, 2, 4}
    assert (128, 1) in sizes("bfloat16") and (16, 8) in sizes("bfloat16")


def test_candidates_cut_a_batch_into_any_microbatches_that_divide_it():
    config = replace(load("7b")[0], **ADAPTERS)
    found = {one.train.grad_accum for one in candidates(config, parse_topology("l40s:1x1"))}
    assert found == {1, 2, 4, 5, 8, 10, 20, 40}


@pytest.fixture
def on_cpus(monkeypatch):
    monkeypatch.setattr(plan_lib, "topology_devices", lambda topology: jax.devices())


def test_search_finds_the_fastest_that_fits(monkeypatch, capsys):
    compiled = []

    def fake_plan(config, topology, price):
        compiled.append(config)
        first = len(compiled) == 1  # the fastest does not fit
        return {
            "bytes_per_chip": {"total": 2**30},
            "fits": not first,
            "step_seconds": 1.0 + len(compiled),
            "mfu_6n": 0.5,
            "cost": price,
        }

    monkeypatch.setattr(plan_lib, "plan", fake_plan)
    result = search(CONFIG, EIGHT, limit=3, price=2.0)
    assert (result["fits"], result["step_seconds"], result["cost"]) == (True, 3.0, 2.0)
    assert result["options"] == options(compiled[1])
    assert [one["step_seconds"] for one in result["tried"]] == [2.0, 3.0, 4.0]
    guesses = [one["estimate"]["seconds"] for one in result["tried"]]
    assert guesses == sorted(guesses)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert "1.00 GiB, does NOT fit, 2.000 s, MFU 50.0%" in lines[0]


def test_search_when_nothing_fits(on_cpus):
    small = dataclasses.replace(EIGHT, chip=dataclasses.replace(EIGHT.chip, hbm_bytes=1000))
    with pytest.raises(UserError, match="none of 1 candidates fits v5e:2x4; take more chips"):
        search(CONFIG, small, limit=3, price=0.0)


def test_a_batch_that_divides_over_no_mesh():
    with pytest.raises(UserError, match="global_batch=3 divides over no mesh of 8 devices"):
        search(replace(CONFIG, train__global_batch=3), EIGHT, limit=1, price=0.0)


def told(config, topology, factor):
    """Advice, where the program needs so many times the memory that there is."""
    each = topology.chip.hbm_bytes
    mesh = {"data": 1, "fsdp": topology.devices, "context": 1, "tensor": 1}
    return advice(config, topology, {"bytes_per_chip": {"total": factor * each}, "mesh": mesh})


def test_advice_begins_with_what_costs_least():
    config, _ = load("7b")
    config = replace(config, model__remat="none", train__global_batch=512)
    lines = told(config, parse_topology("v5e-64"), 1.3)
    assert lines[0].startswith("--config.model.remat=save:") and "GiB a chip" in lines[0]
    lines = told(replace(config, model__remat="full"), parse_topology("v5e-64"), 1.3)
    assert lines[0].startswith("--config.model.remat=full --config.train.grad_accum=2")


def test_advice_when_more_chips_are_needed():
    config, _ = load("65b")
    config = replace(config, train__global_batch=256)
    lines = told(config, parse_topology("h100:1x8"), 3)
    assert any(line.startswith("--topology=h100:") for line in lines), lines
    assert told(config, parse_topology("v5e:2x2"), 1e5) == [
        "nothing that one change does: take several times the chips"
    ]


def test_advice_for_adapters():
    """What the compiler said of 40 sequences at once, in GiB; all it takes is named."""
    config = replace(load("7b")[0], **ADAPTERS)

    def lines(config, topology, total):
        result = {"bytes_per_chip": {"total": total * 2**30}}
        mesh = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
        return advice(config, parse_topology(topology), {**result, "mesh": mesh})

    found = lines(config, "rtx4090:1x1", 22.34)
    assert found[0].startswith("--config.model.remat=full --config.train.grad_accum=2 (about")
    assert found[1].startswith("--config.lora.base_dtype=nf4 (about")
    large, _ = load("65b")
    large = replace(large, **ADAPTERS)
    both = "--config.lora.base_dtype=nf4 --config.model.remat=full --config.train.grad_accum="
    assert lines(large, "l40s:1x1", 158.0)[0].startswith(both)
    packed = replace(large, lora__base_dtype="nf4")
    (accumulate, chips) = lines(packed, "l40s:1x1", 67.63)
    assert accumulate.startswith("--config.model.remat=full --config.train.grad_accum=")
    assert chips.startswith("--topology=l40s:2x1")
    # Without blocks of 64 inputs there is no NF4.
    odd = replace(config, model__ffn_dim=11000)
    assert not any("nf4" in line for line in lines(odd, "rtx4090:1x1", 22.34))


def test_what_divides():
    config, _ = load("13b")
    text = what_divides(config, parse_topology("h100:256x8"))
    assert text.startswith("try --config.mesh.data=2 --config.mesh.fsdp=1024 ")
    assert text.endswith("--config.mesh.tensor=1 --config.train.grad_accum=1")
    text = what_divides(config, parse_topology("h100:25x8"))
    assert text == "its 2048 sequences divide over 128 devices"


def test_options_are_flags():
    text = options(replace(CONFIG, model__remat="full"))
    assert "--config.mesh.fsdp=-1" in text and "--config.model.remat=full" in text
    assert search_lib.options(CONFIG).endswith("--config.train.grad_accum=1")
