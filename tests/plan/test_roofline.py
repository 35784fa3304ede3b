import dataclasses

import pytest

from llama_jax.hardware.chips import chip_named
from llama_jax.plan.hlo import Collective, parse
from llama_jax.plan.roofline import _Schedule, predict

H100, V5P = chip_named("h100"), chip_named("v5p")
GATHER = 8192 * 32000 * 2

MODULE = """
%body (c: (s32[], bf16[2048,8192])) -> (s32[], bf16[2048,8192]) {
  %c = (s32[], bf16[2048,8192]{1,0}) parameter(0)
  %w = bf16[16,8192]{1,0} parameter(1)
  %v = bf16[2048,8192]{1,0} get-tuple-element(%c), index=1
  START
  %y = bf16[2048,8192]{1,0} dot(%v, %k), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  DONE
  ROOT %t = (s32[], bf16[2048,8192]{1,0}) tuple(%v, %y)
}

%cond (c: (s32[], bf16[2048,8192])) -> pred[] {
  ROOT %lt = pred[] constant(true)
}

ENTRY %main (a: bf16[2048,8192]) -> bf16[2048,8192] {
  %init = (s32[], bf16[2048,8192]{1,0}) parameter(0)
  ROOT %l = (s32[], bf16[2048,8192]{1,0}) while(%init), condition=%cond, body=%body, TRIPS
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"10"}}')
START = (
    "%s = (bf16[16,8192]{1,0}, bf16[128,8192]{1,0}) all-gather-start(%w), "
    "replica_groups=[1,8]<=[8], dimensions={0}"
)
DONE = "%d = bf16[128,8192]{1,0} all-gather-done(%s)"


def module(start, done):
    return parse(MODULE.replace("START", start).replace("DONE", done))


def test_a_collective_beside_compute_costs_nothing():
    nodes = [0] * 8
    beside = predict(module(START, DONE), H100, nodes)
    work = 10 * 2 * 2048 * 8192 * 8192
    assert beside.flops == work and beside.compute == work / 989e12
    assert beside.step == pytest.approx(work / (0.71 * 989e12))
    sent = 7 / 8 * 128 * 8192 * 2 / 450e9 + 7 * 1.9e-6
    assert beside.network == pytest.approx(10 * sent)
    assert beside.exposed == pytest.approx(0, abs=1e-9) and beside.cycles is None
    waiting = predict(module(START + "\n  " + DONE, ""), H100, nodes)
    assert waiting.step == pytest.approx(beside.step + 10 * sent)
    assert waiting.exposed == pytest.approx(10 * sent)
    at_once = START.replace("-start", "").replace(
        "(bf16[16,8192]{1,0}, bf16[128,8192]{1,0})", "bf16[128,8192]"
    )
    assert predict(module(at_once, ""), H100, nodes).step == pytest.approx(waiting.step)


def test_bound_by_the_memory():
    slow = dataclasses.replace(H100, hbm_bandwidth=1e9)
    found = predict(module("", ""), slow, [0] * 8)
    # The module does not define %k, so its bytes are not counted.
    assert found.memory_bytes == 10 * (2 * 2048 * 8192 * 2)
    assert found.step == found.memory == pytest.approx(found.memory_bytes / 1e9)


def test_cycles_of_the_compiler():
    text = MODULE.replace(
        "rhs_contracting_dims={0}",
        'rhs_contracting_dims={0}, backend_config={"estimated_cycles":"175000"}',
    )
    found = predict(parse(text.replace("START", "").replace("DONE", "")), V5P, [0] * 8)
    assert found.cycles == pytest.approx(10 * 1e-4)
    assert found.step == max(found.cycles, found.compute)
    slow = dataclasses.replace(V5P, hbm_bandwidth=1e6)
    assert predict(parse(text.replace("START", "").replace("DONE", "")), slow, [0] * 8).step > 100


@pytest.mark.parametrize(
    ("kind", "groups", "seconds"),
    [
        # One node: NVLink.
        ("all-gather", (tuple(range(8)),), 7 / 8 * GATHER / 450e9 + 7 * 1.9e-6),
        ("all-reduce", ((0, 1),), GATHER / 450e9 + 2 * 1.9e-6),
        # Two nodes of eight GPUs: the eight network cards work together.
        ("all-gather", (tuple(range(16)),), 15 / 16 * GATHER / 400e9 + 14 * 1.9e-6 + 4e-6),
        # One GPU of each node: only its own network card.
        ("reduce-scatter", ((0, 8),), 1 / 2 * GATHER / 50e9 + 4e-6),
        ("collective-permute", ((0, 8),), GATHER / 50e9 + 4e-6),
        ("all-gather", ((0,),), 0.0),
    ],
)
def test_where_a_collective_goes(kind, groups, seconds):
    schedule = _Schedule(parse(""), H100, [device // 8 for device in range(16)])
    found = schedule.network_seconds(Collective(kind, "bf16", GATHER, groups))
    assert found == pytest.approx(seconds)


def test_slices_are_joined_by_a_slow_network():
    schedule = _Schedule(parse(""), V5P, [device // 64 for device in range(128)])
    across = schedule.network_seconds(Collective("all-reduce", "f32", GATHER, ((0, 64),)))
    within = schedule.network_seconds(Collective("all-reduce", "f32", GATHER, ((0, 1),)))
    assert across == pytest.approx(GATHER / 6.25e9, rel=1e-3)
    assert within == pytest.approx(GATHER / 600e9, rel=1e-2)


@pytest.mark.parametrize("wrapper", ["async", "call"])
def test_collectives_within_fusions_within_wrappers(wrapper):
    text = f"""
%scattered (p: f32[8]) -> f32[8] {{
  ROOT %r = f32[8]{{0}} all-reduce(%p), replica_groups=[1,2]<=[2], to_apply=%add
}}

%wrapped (p: f32[8]) -> f32[8] {{
  ROOT %f = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%scattered
}}

ENTRY %main (a: f32[8]) -> f32[8] {{
  %s = ((f32[8]), f32[8]) {wrapper}-start(%a), to_apply=%wrapped
  ROOT %d = f32[8]{{0}} {wrapper}-done(%s)
}}
"""
    found = predict(parse(text), H100, [0, 1])
    assert found.network == found.exposed == pytest.approx(32 / 50e9 + 2 * 4e-6)


def test_a_chain_is_sent_once_and_hidden_behind_what_runs_between():
    """libtpu writes an asynchronous gather as three fusions with one channel."""
    cycles = {"short": 175_000, "long": 17_500_000}  # 0.1 and 10 ms
    size = 64 * 2**20
    gather = "all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}"
    text = f"""
%part (p: bf16[8388608]) -> bf16[67108864] {{
  %p = bf16[8388608]{{0}} parameter(0)
  ROOT %g = bf16[67108864]{{0}} {gather}
}}

ENTRY %main (p: bf16[8388608]) -> bf16[67108864] {{
  %p = bf16[8388608]{{0}} parameter(0)
  %s = bf16[67108864]{{0}} fusion(%p), kind=kCustom, calls=%part
  %m = bf16[67108864]{{0}} fusion(%s), calls=%part, backend_config={{"estimated_cycles":"CYCLES"}}
  ROOT %d = bf16[67108864]{{0}} fusion(%m), kind=kCustom, calls=%part
}}
"""
    took = 2 * size * 7 / 8 / 600e9
    for name, count in cycles.items():
        found = predict(parse(text.replace("CYCLES", str(count))), V5P, [0] * 8)
        assert found.network == pytest.approx(took, rel=0.05)
        waited = max(0.0, found.network - count / 1.75e9)
        assert found.exposed == pytest.approx(waited, abs=1e-9), name
        assert found.exposed_by_kind == ({"all-gather": waited} if waited else {})
        assert found.step == pytest.approx(max(found.network, count / 1.75e9, found.memory))


@pytest.mark.parametrize(("dtype", "factor"), [("bf16", 1), ("f8e4m3fn", 2), ("s8", 2)])
def test_a_product_is_timed_by_the_type_of_its_operands(dtype, factor):
    axes = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    text = f"""
ENTRY %main (a: {dtype}[4096,4096]) -> f32[4096,4096] {{
  %a = {dtype}[4096,4096]{{1,0}} parameter(0)
  ROOT %x = f32[4096,4096]{{1,0}} dot(%a, %a), {axes}
}}
"""
    found = predict(parse(text), H100, [0])
    assert found.flops == 2 * 4096**3
    assert found.compute == pytest.approx(found.flops / (factor * 989e12))
    assert found.step == pytest.approx(found.compute / 0.71)
