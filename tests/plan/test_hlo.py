import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.plan.hlo import (
    collective_schedule,
    hbm_bytes,
    parse,
    read_collective,
    replica_groups,
    shape_bytes,
    summarize,
)
from tests.helpers import mesh_of


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]{1,0}", 24),
        ("bf16[8]", 16),
        ("(f32[2], s8[3])", 11),
        ("pred[]", 1),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert shape_bytes(shape) == size


def test_collectives_of_a_compiled_loop_count_every_turn():
    mesh = mesh_of((8, 1, 1, 1))

    def local(x):
        def body(carry, _):
            total = jax.lax.psum(carry, "data")
            return carry + 1e-3 * jnp.sin(total), None

        x, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.all_gather(x, "data", tiled=True)

    with jax.set_mesh(mesh):
        function = jax.jit(
            jax.shard_map(local, in_specs=P("data"), out_specs=P(None), check_vma=False)
        )
        text = function.lower(jnp.zeros((64, 4))).compile().as_text()
    summary = summarize(text)
    # 8 x 4 float32 on each device; gathered, 64 x 4.
    assert summary.collectives == {"all-reduce": (5, 5 * 8 * 4 * 4), "all-gather": (1, 64 * 4 * 4)}


MODULE = """
HloModule m

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %x = f32[4]{0} add(%p, %p), backend_config={"estimated_cycles":"999"}
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%cond (c: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %c = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %f = f32[4]{0} fusion(%v), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  %r = f32[4]{0} all-reduce(%f), to_apply=%add, backend_config={"estimated_cycles":"3"}
  %ags = (bf16[4], bf16[32]) all-gather-start(%f), dimensions={0}
  %agd = bf16[32] all-gather-done(%ags)
  ROOT %t = (s32[], f32[4]) tuple(%i, %r)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%init), condition=%cond, body=%body
  %w2 = (s32[], f32[4]) while(%i), condition=%cond, body=%body, CONFIG{"known_trip_count":{"n":"2"}}
  ROOT %out = f32[4]{0} fusion(%w), kind=kLoop, calls=%fused, CONFIG{"estimated_cycles":"100"}
}
""".replace("CONFIG", "backend_config=")


def test_loops_fusions_and_asynchronous_starts():
    summary = summarize(MODULE)
    turns = 7 + 2
    assert summary.cycles == turns * 13 + 100
    assert summary.collectives == {
        "all-reduce": (turns, turns * 16),
        "all-gather": (turns, turns * 32 * 2),
    }
    assert summary.by_dtype["all-gather bf16"] == summary.collectives["all-gather"]
    assert summary.by_dtype["all-reduce f32"] == summary.collectives["all-reduce"]


def test_an_estimate_that_is_none():
    """libtpu writes the largest integer for operations on a SparseCore."""
    text = MODULE.replace('"estimated_cycles":"100"', f'"estimated_cycles":"{2**63 - 1}"')
    assert summarize(text).cycles == summarize(MODULE).cycles - 100


def test_a_comparison_within_a_fusion():
    compare = "%lt = pred[] compare(%i, %limit), direction=LT"
    fused = "%lt = pred[] fusion(%i), kind=kLoop, calls=%compared"
    inner = """
%compared (i: s32[]) -> pred[] {
  %limit.1 = s32[] constant(7)
  ROOT %lt.1 = pred[] compare(%i, %limit.1), direction=LT
}
"""
    text = MODULE.replace("%limit = s32[]{:T(128)} constant(7)", "").replace(compare, fused) + inner
    assert summarize(text).collectives == summarize(MODULE).collectives


def test_a_loop_of_unknown_length_counts_once():
    text = MODULE.replace("direction=LT", "direction=NE").replace('"n":"2"', '"m":"2"')
    assert summarize(text).collectives["all-reduce"][0] == 2


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=4,'b'=1] {'a':(1)2}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4,'b'=1] {'a':(2)2}", ((0, 1), (2, 3))),
        ("dimensions={0}", ()),
    ],
)
def test_groups_of_devices(text, groups):
    assert (
        replica_groups(f"%x = f32[4] all-gather(%y), {text}, use_global_device_ids=true") == groups
    )


def test_the_larger_side_of_a_collective():
    text = """
ENTRY %main (a: f32[4]) -> f32[4] {
  %rs = ((f32[8], bf16[2]), (f32[2], bf16[1])) reduce-scatter-start(%a), replica_groups=[1,4]<=[4]
  %ar = f32[8] all-reduce-start(%a), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %ag = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%a), replica_groups=[1,4]<=[4]
}
"""
    scope = parse(text).computations["main"]
    scatter, reduce, gather = (read_collective(scope[name]) for name in ("rs", "ar", "ag"))
    assert (scatter.size, scatter.dtype) == (4 * (2 * 4 + 2), "f32")
    assert (reduce.size, gather.size, gather.dtype) == (32, 16, "bf16")


def test_what_lies_in_another_memory_is_no_traffic():
    assert hbm_bytes("(f32[8]{0:T(128)}, f32[8]{0:T(128)S(1)})") == 32


def test_collectives_of_a_look_up():
    where = 'metadata={op_name="jit(f)/jvp(Llama)/jit(_take)/gather"}'
    text = MODULE.replace("to_apply=%add,", f"to_apply=%add, {where},")
    assert summarize(text).lookup == 2 and summarize(MODULE).lookup == 0
    assert summarize(text.replace("jvp(Llama)", "transpose(jvp(Llama))")).lookup == 0


def test_a_chain_of_fusions_is_one_collective():
    """It starts at the first fusion with its channel, and ends at the last."""
    module = parse(CHAIN)
    gather, reduce = collective_schedule("main", module)
    assert (gather.start, gather.end) == ("async-collective-start", "async-collective-done")
    assert gather.asynchronous and gather.collective.size == 64 * 2
    assert (reduce.start, reduce.end, reduce.asynchronous) == ("r", "r", False)
    summary = summarize(CHAIN)
    assert summary.collectives == {"all-gather": (1, 128), "all-reduce": (1, 32)}
    assert summary.asynchronous == {"all-gather": (1, 128)}
    assert summary.synchronous == {"all-reduce": (1, 32)}
    assert summary.by_dtype == {"all-gather bf16": (1, 128), "all-reduce f32": (1, 32)}
    assert summary.cycles == 70


CHAIN = """
%begin (p: bf16[8]) -> bf16[64] {
  %p = bf16[8]{0} parameter(0)
  ROOT %g.1 = bf16[64]{0} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%middle (p: bf16[8], x: f32[8]) -> bf16[64] {
  %p.1 = bf16[8]{0} parameter(0)
  %x.1 = f32[8]{0} parameter(1)
  %y.1 = f32[8]{0} multiply(%x.1, %x.1)
  ROOT %g.2 = bf16[64]{0} all-gather(%p.1), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%end (p: bf16[8]) -> bf16[64] {
  %p.2 = bf16[8]{0} parameter(0)
  ROOT %g.3 = bf16[64]{0} all-gather(%p.2), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (a: bf16[8], b: f32[8]) -> bf16[64] {
  %a = bf16[8]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %async-collective-start = bf16[64]{0} fusion(%a), kind=kCustom, calls=%begin
  %fusion.1 = bf16[64]{0} fusion(%a, %b), calls=%middle, CONFIG{"estimated_cycles":"70"}
  %async-collective-done = bf16[64]{0} fusion(%fusion.1), kind=kCustom, calls=%end
  ROOT %r = f32[8]{0} all-reduce(%b), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%add
}
""".replace("CONFIG", "backend_config=")


@pytest.mark.parametrize(
    ("between", "line", "asynchronous"),
    [
        ("%y = f32[8]{0} negate(%b)", "", True),
        ("", "", False),
        ("%z = f32[8]{0} get-tuple-element(%s), index=0", "", False),
        ("%y = f32[8]{0} negate(%b)", ', backend_config={"is_sync":true}', False),
    ],
)
def test_what_runs_beside_a_collective(between, line, asynchronous):
    text = f"""
ENTRY %main (b: f32[8]) -> f32[8] {{
  %b = f32[8]{{0}} parameter(0)
  %s = f32[8]{{0}} all-reduce-start(%b), channel_id=1, replica_groups=[1,8]<=[8]{line}
  {between}
  ROOT %d = f32[8]{{0}} all-reduce-done(%s)
}}
"""
    (found,) = collective_schedule("main", parse(text))
    assert found.asynchronous is asynchronous
    kind = summarize(text).asynchronous if asynchronous else summarize(text).synchronous
    assert kind == {"all-reduce": (1, 32)}


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ('"emitter":"3DAllGatherOnMajorDim"', 6),
        ('"emitter":"1DAllGatherNonMajorDimImbalanced"', 2),
        ('"emitter":"RotatedPincerEmitter","strategy":"UniDirectionNDRingStrategy","debug":"\\n'
         'UniDirectionNDRingStrategy{colors:6 phases:3 cores:{8 8 8}"', 6),
        ('"strategy":"StrategyND","debug":"\\nStrategyND{colors:3 phases:3 cores:{8 8 8}"', 6),
        ('"strategy":"StrategyRing","debug":"StrategyRing{colors:1 phases:1 cores:{256}"', 2),
        ('"emitter":"EmitAllBatchInSublanes"', 0),
    ],
)  # fmt: skip
def test_links_of_the_compilers_algorithm(text, links):
    line = f"%r = f32[8]{{0}} all-reduce(%b), replica_groups=[1,8]<=[8], backend_config={{{text}}}"
    scope = parse(f"ENTRY %main (b: f32[8]) -> f32[8] {{\n  ROOT {line}\n}}").computations["main"]
    assert read_collective(scope["r"]).links == links
