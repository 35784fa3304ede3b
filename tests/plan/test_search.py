import dataclasses

import jax
import pytest

from llama_jax.errors import UserError
from llama_jax.hardware.chips import chip_named
from llama_jax.hardware.topology import Topology, parse_topology
from llama_jax.model.cost import frozen_bytes
from llama_jax.model.weights import abstract_frozen
from llama_jax.plan import report, tpu_schedule
from llama_jax.plan import search as search_lib
from llama_jax.plan.advice import advice
from llama_jax.plan.candidates import candidates, flags_for, suggest_dividing_mesh
from llama_jax.plan.estimate import estimate, saved_elements_per_token
from llama_jax.plan.search import search
from llama_jax.plan.tpu_schedule import Scheduled
from tests.helpers import TINY, replace
from tests.reference import plans
from tests.test_config import load

EIGHT = Topology(chip_named("v5e"), (2, 4))
CONFIG = replace(TINY, train__global_batch=32)
LARGE, SLICE = load("65b")[0], parse_topology("v5p-1024")
BEST = "save:mlp_gate,mlp_up,attn_out,q"  # the policy that keeps most of LARGE in 96 GB


# Left out: attention by XLA over a divided sequence of 131,072 tokens, NF4 unpacked on a TPU, and
# models so small that most of the time goes to neither products nor kernels.
FAR = ("h200:64x8", "h200:128x8", "v5e:2x2", "v5e:4x4")
NEAR = [one for one in plans.HOMES if one.topology not in FAR and one not in plans.SMALL]


@pytest.mark.parametrize("home", NEAR, ids=lambda home: home.name)
def test_the_estimate_is_near_the_compiler(home):
    """A factor of two in memory and time is enough to sort candidates."""
    guess = estimate(home.loaded, parse_topology(home.topology))
    stored = plans.golden(home)
    assert guess.total / 2**30 == pytest.approx(stored["gib_per_chip"]["total"], rel=0.5)
    assert guess.seconds == pytest.approx(stored["step_seconds"], rel=0.5)


# GiB of one device: the heaps of programs that libtpu 0.0.42.1 scheduled with the preset of their
# chip, with fsdp over the whole slice by default.
MLP = "save:mlp_gate,mlp_up"
HEAPS = [
    ("65b", "v5p-1024", {"model__remat": "full"}, 16.02),
    ("65b", "v5p-1024", {"model__remat": "full", "mesh__data": 2}, 18.18),
    ("65b", "v5p-1024", {"model__remat": "full", "mesh__tensor": 2}, 16.11),
    ("65b", "v5p-1024", {"model__remat": "full", "train__grad_accum": 2}, 11.08),
    ("65b", "v5p-1024", {"model__remat": "save:mlp_up"}, 42.56),
    ("65b", "v5p-1024", {"model__remat": "save:mlp_up,attn_context"}, 52.47),
    ("65b", "v5p-1024", {"model__remat": MLP}, 69.44),
    ("65b", "v5p-1024", {"model__remat": f"{MLP},attn_out,q"}, 88.97),
    ("65b", "v5p-1024", {"model__remat": f"{MLP},attn_out,q,k,v"}, 107.79),
    ("65b", "v5p-1024", {"model__remat": "none"}, 274.56),
    ("65b", "v4-2048", {"model__remat": "save:mlp_up"}, 22.59),
    ("7b", "v5p-128", {"model__remat": "full"}, 29.28),
    ("7b", "v5p-128", {"model__remat": "save:mlp_up"}, 70.94),
    ("7b", "v5p-128", {"model__remat": MLP, "train__grad_accum": 2}, 58.04),
    ("7b", "v5p-128", {"model__remat": "none", "train__grad_accum": 8}, 57.93),
]


@pytest.mark.parametrize(("name", "topology", "changes", "heap"), HEAPS, ids=str)
def test_the_estimate_of_memory_is_within_a_few_percent(name, topology, changes, heap):
    guess = estimate(replace(load(name)[0], **changes), parse_topology(topology))
    assert guess.total / 2**30 == pytest.approx(heap, rel=0.09)


def test_the_estimate_knows_the_network_between_copies():
    slices = parse_topology("v5p-128", 2)
    slow = dataclasses.replace(slices.chip, network_bandwidth=1e6)
    config = replace(load("7b")[0], dcn__data=2)
    fast = estimate(config, slices).seconds
    assert estimate(config, dataclasses.replace(slices, chip=slow)).seconds > 10 * fast


def test_the_estimate_knows_the_torus():
    """The whole slice has six links a chip; half of a dimension is one ring in one direction."""

    def seconds(**changes):
        return estimate(replace(LARGE, model__remat="full", **changes), SLICE).seconds

    assert seconds() < seconds(mesh__data=2) < seconds(mesh__tensor=2)
    # 512 sequences leave little compute to hide the network behind, and v5e's network has two
    # dimensions.
    flat, halves = parse_topology("v5e:16x16"), parse_topology("v5e:8x32")
    config = replace(LARGE, model__remat="full", train__global_batch=256)
    assert estimate(config, flat).seconds < estimate(config, halves).seconds


def test_the_estimate_knows_the_attention_kernel():
    """Saving its output avoids a second forward pass: 2 of 11 products, at half of the peak."""
    config = replace(LARGE, train__seq_len=16384, train__global_batch=512)
    times = [
        estimate(replace(config, model__remat=remat), SLICE).seconds
        for remat in ("save:attn_out", "save:attn_out,attn_context")
    ]
    tokens, square = 16384, 80 * 8192 * 16384
    saved = 2 * square * tokens / (0.5 * SLICE.chip.peak_flops)
    assert times[0] - times[1] == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize(("flag", "factor"), [("", 1), ("=true", 1.5), ("=false", 1)])
def test_two_microbatches_at_once_take_more_memory(monkeypatch, flag, factor):
    """XLA's double buffering overlaps them: 7B on 128 H100s takes 67.2 GiB instead of 45.4."""
    name = "--xla_gpu_enable_while_loop_double_buffering"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 {name}{flag}" if flag else "")
    keep = "save:q,k,v,attn_context,mlp_gate,mlp_up"
    config = replace(load("7b")[0], model__remat=keep, train__grad_accum=2)
    total = estimate(config, parse_topology("h100:16x8")).total / 2**30
    assert total == pytest.approx(67.2 if factor > 1 else 45.4, rel=0.06)


def test_candidates_divide():
    found = list(candidates(CONFIG, EIGHT))
    meshes = {dataclasses.astuple(one.mesh) for one in found}
    assert (1, 8, 1, 1) in meshes and (2, 2, 1, 2) in meshes
    assert all(one.mesh.tensor <= 4 for one in found)  # it has four heads
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
    """The base's size is known to the byte; trained weights take 16 bytes each and more."""
    config = replace(load("7b")[0], **ADAPTERS, lora__base_dtype=base_dtype)
    base = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_frozen(config)))
    assert frozen_bytes(config.model, config.lora) == pytest.approx(base, rel=1e-3)
    one = parse_topology("h100:1x1")
    total = estimate(replace(config, train__grad_accum=40), one).total
    assert base < total < base + 2 * 2**30
    # Two GPUs share the base, but each needs its own working memory.
    assert estimate(replace(config, train__grad_accum=20), parse_topology("h100:1x2")).total < total


def test_the_time_of_adapters():
    """4 FLOPs a weight instead of 6; with NF4, each microbatch unpacks the base again."""
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
    monkeypatch.setattr(report, "topology_devices", lambda topology: jax.devices())


def test_search_finds_the_fastest_that_fits(monkeypatch, capsys):
    compiled = []

    def fake_plan(config, topology, price):
        compiled.append(config)
        first = len(compiled) == 1  # the fastest candidate does not fit
        return {
            "bytes_per_chip": {"total": 2**30},
            "fits": not first,
            "step_seconds": 1.0 + len(compiled),
            "mfu_6n": 0.5,
            "cost": price,
        }

    monkeypatch.setattr(search_lib, "plan", fake_plan)
    result = search(CONFIG, EIGHT, limit=3, price=2.0)
    assert (result["fits"], result["step_seconds"], result["cost"]) == (True, 3.0, 2.0)
    assert result["options"] == flags_for(compiled[1])
    assert [one["step_seconds"] for one in result["tried"]] == [2.0, 3.0, 4.0]
    guesses = [one["estimate"]["seconds"] for one in result["tried"]]
    assert guesses == sorted(guesses)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert "1.00 GiB, does NOT fit, 2.000 s, MFU 50.0%" in lines[0]


def fake_compilers(monkeypatch, *, scheduled_gib, plan_gib=None, steps=None, fails=()):
    """Installs compilers with these answers, given by a candidate's remat policy or "other"."""
    said = {"scheduled": [], "compiled": []}

    def key(config):
        whole = config.mesh.data == 1 and config.mesh.tensor == 1
        return config.model.remat if whole and config.train.grad_accum == 1 else "other"

    def schedule(config, topology):
        said["scheduled"].append(config)
        if key(config) in fails:
            raise UserError("vmem is too small")
        size = scheduled_gib(key(config)) * 2**30
        fits = size <= topology.chip.hbm_bytes
        return Scheduled(int(size), fits, 1.0 + len(said["scheduled"]) if fits else None)

    def fake_plan(config, topology, price):
        said["compiled"].append(config)
        gib = (plan_gib or scheduled_gib)(key(config))
        step = (steps or {}).get(key(config), 5.0)
        return {
            "bytes_per_chip": {"total": gib * 2**30},
            "fits": gib * 2**30 <= topology.chip.hbm_bytes,
            "step_seconds": step,
            "mfu_6n": 0.5,
        }

    monkeypatch.setattr(tpu_schedule, "available", lambda topology: True)
    monkeypatch.setattr(tpu_schedule, "schedule", schedule)
    monkeypatch.setattr(search_lib, "plan", fake_plan)
    return said


def test_a_search_for_tpus_schedules_all_and_compiles_the_best(monkeypatch, capsys):
    said = fake_compilers(monkeypatch, scheduled_gib=lambda remat: 80)
    result = search(LARGE, SLICE, limit=6, price=0.0)
    first = said["scheduled"][:3]
    assert all((one.mesh.data, one.mesh.fsdp, one.mesh.tensor) == (1, 512, 1) for one in first)
    assert all(one.train.grad_accum == 1 for one in first)
    assert first[0].model.remat == BEST  # the policy that keeps most in 96 GB
    rest = [(one.mesh.fsdp, one.train.grad_accum) for one in said["scheduled"][3:]]
    assert rest[:2] == [(512, 2), (512, 4)] and rest[2][0] != 512
    meshes = [dataclasses.astuple(one.mesh) for one in said["scheduled"][5:]]
    assert len(meshes) == 1 and (1, 512, 1, 1) not in meshes
    assert said["compiled"] == said["scheduled"][:2]
    kinds = [one["kind"] for one in result["tried"]]
    assert kinds == ["compiled"] * 2 + ["scheduled"] * 4
    assert [one["scheduled_seconds"] for one in result["tried"]] == [2, 3, 4, 5, 6, 7]
    assert [one["step_seconds"] for one in result["tried"][:3]] == [5.0, 5.0, None]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert lines[0].startswith(f"1/6 {flags_for(first[0])}: about 8")
    assert lines[0].endswith(" GiB, fits, about 2.000 s")
    assert lines[6] == f"1/6 {flags_for(first[0])}: 80.00 GiB, fits, 5.000 s, MFU 50.0%"


def test_of_few_microbatches_one_is_compiled_too(monkeypatch):
    """More microbatches have the better schedules here."""
    said = fake_compilers(monkeypatch, scheduled_gib=lambda remat: 80)
    real = tpu_schedule.schedule

    def schedule(config, topology):
        found = real(config, topology)
        return dataclasses.replace(found, seconds=found.seconds / config.train.grad_accum**2)

    monkeypatch.setattr(tpu_schedule, "schedule", schedule)
    search(LARGE, SLICE, limit=6, price=0.0)
    assert [one.train.grad_accum for one in said["scheduled"]] == [1, 1, 1, 2, 4, 1]
    assert said["compiled"] == [said["scheduled"][4], said["scheduled"][0]]


def test_a_search_for_tpus_takes_the_fastest_plan(monkeypatch):
    """It may not be the first schedule: cycles are known only after code generation."""
    second = "save:mlp_gate,mlp_up,attn_out"
    said = fake_compilers(monkeypatch, scheduled_gib=lambda remat: 80, steps={second: 4.0})
    result = search(LARGE, SLICE, limit=6, price=0.0)
    assert said["compiled"][1].model.remat == second
    assert result["options"] == flags_for(said["compiled"][1]) and result["step_seconds"] == 4.0


def test_what_does_not_fit_its_schedule_is_not_compiled(monkeypatch, capsys):
    sizes = {BEST: 97, "save:mlp_gate,mlp_up,attn_out": 96}
    said = fake_compilers(monkeypatch, scheduled_gib=lambda remat: sizes.get(remat, 80))
    result = search(LARGE, SLICE, limit=6, price=0.0)
    assert [one["fits"] for one in result["tried"]] == [False, False, True, True, True, True]
    assert not {one.model.remat for one in said["compiled"]} & {*sizes}
    assert result["tried"][0]["scheduled_seconds"] is None
    line = capsys.readouterr().err.splitlines()[0]
    assert line.endswith(": about 97.00 GiB, does NOT fit")


def test_a_plan_that_does_not_fit_makes_room_for_the_next(monkeypatch):
    sizes = {BEST: 97}
    said = fake_compilers(
        monkeypatch, scheduled_gib=lambda remat: 80, plan_gib=lambda remat: sizes.get(remat, 80)
    )
    result = search(LARGE, SLICE, limit=6, price=0.0)
    assert said["compiled"] == said["scheduled"][:3]
    assert result["options"] == flags_for(said["compiled"][1])
    assert not result["tried"][0]["fits"] and result["tried"][0]["kind"] == "compiled"


def test_a_candidate_that_does_not_compile_is_skipped(monkeypatch, capsys):
    fake_compilers(monkeypatch, scheduled_gib=lambda remat: 80, fails={BEST})
    result = search(LARGE, SLICE, limit=6, price=0.0)
    told = result["tried"][0]
    assert (told["fits"], told["total"], told["error"]) == (False, None, "vmem is too small")
    assert (
        capsys.readouterr()
        .err.splitlines()[0]
        .endswith(": skipped, the compiler fails: vmem is too small")
    )


@pytest.mark.parametrize("error", [UserError("wrong tiles"), jax.errors.JaxRuntimeError("bug")])
def test_where_no_candidate_compiles(monkeypatch, capsys, error):
    def fake_plan(config, topology, price):
        raise error

    monkeypatch.setattr(search_lib, "plan", fake_plan)
    with pytest.raises(UserError, match=f"none of 2 candidates compiles: {error}"):
        search(CONFIG, EIGHT, limit=2, price=0.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.endswith(f"fails: {error}") for line in lines)


def test_a_missing_compiler_is_told_at_once(monkeypatch, capsys):
    def fake_plan(config, topology, price):
        raise UserError("no topology v5e:2x4: libtpu is not installed")

    monkeypatch.setattr(search_lib, "plan", fake_plan)
    with pytest.raises(UserError, match="no topology v5e:2x4: libtpu"):
        search(CONFIG, EIGHT, limit=2, price=0.0)
    assert capsys.readouterr().err == ""


def test_search_when_nothing_fits(on_cpus):
    small = dataclasses.replace(EIGHT, chip=dataclasses.replace(EIGHT.chip, hbm_bytes=1000))
    with pytest.raises(UserError, match="none of 1 candidates fits v5e:2x4; take more chips"):
        search(CONFIG, small, limit=3, price=0.0)


def test_a_batch_that_divides_over_no_mesh():
    with pytest.raises(UserError, match="global_batch=3 divides over no mesh of 8 devices"):
        search(replace(CONFIG, train__global_batch=3), EIGHT, limit=1, price=0.0)


def told(config, topology, factor):
    """Returns the advice for a program that needs `factor` times the available memory."""
    each = topology.chip.hbm_bytes
    mesh = {"data": 1, "fsdp": topology.devices, "context": 1, "tensor": 1}
    return advice(config, topology, {"bytes_per_chip": {"total": factor * each}, "mesh": mesh})


def test_advice_begins_with_what_costs_least():
    config, _ = load("7b")
    config = replace(config, model__remat="none", train__global_batch=512)
    lines = told(config, parse_topology("v5e-64"), 1.3)
    assert lines[0].startswith("--config.model.remat=save:") and "GiB a chip" in lines[0]
    lines = told(replace(config, model__remat="full"), parse_topology("v5e-64"), 1.3)
    assert lines[0].startswith("--config.train.grad_accum=2 (about")


def test_advice_when_more_chips_are_needed():
    config, _ = load("65b")
    config = replace(config, train__global_batch=256)
    lines = told(config, parse_topology("h100:1x8"), 3)
    assert any(line.startswith("--topology=h100:") for line in lines), lines
    assert told(config, parse_topology("v5e:2x2"), 1e5) == [
        "no single change is enough: use several times as many chips"
    ]


def test_advice_for_adapters():
    """The memory is what the compiler reported for 40 sequences at once, in GiB."""
    config = replace(load("7b")[0], **ADAPTERS)

    def lines(config, topology, total):
        result = {"bytes_per_chip": {"total": total * 2**30}}
        mesh = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
        return advice(config, parse_topology(topology), {**result, "mesh": mesh})

    found = lines(config, "rtx4090:1x1", 22.34)
    assert found[0].startswith("--config.train.grad_accum=2 (about")
    assert found[1].startswith("--config.lora.base_dtype=nf4 (about")
    large, _ = load("65b")
    large = replace(large, **ADAPTERS)
    both = "--config.lora.base_dtype=nf4 --config.train.grad_accum="
    assert lines(large, "l40s:1x1", 158.0)[0].startswith(both)
    packed = replace(large, lora__base_dtype="nf4")
    (accumulate, chips) = lines(packed, "l40s:1x1", 67.63)
    assert accumulate.startswith("--config.train.grad_accum=")
    assert chips.startswith("--topology=l40s:2x1")
    # Without blocks of 64 inputs there is no NF4.
    odd = replace(config, model__ffn_dim=11000)
    assert not any("nf4" in line for line in lines(odd, "rtx4090:1x1", 22.34))


def repeated(config, lines):
    """Returns the fields that advice sets to the value that the config already has."""
    values = dataclasses.asdict(config)
    flags = [flag for line in lines for flag in line.split() if flag.startswith("--config.")]
    pairs = [flag.removeprefix("--config.").split("=", 1) for flag in flags]
    split = [(name.split("."), value) for name, value in pairs]
    return [names for names, value in split if str(values[names[0]][names[1]]) == value]


@pytest.mark.parametrize("topology", ["v5p-128", "h100:16x8"])
@pytest.mark.parametrize("remat", ["full", "save:mlp_gate,mlp_up", "save:k", "none"])
@pytest.mark.parametrize(
    "sizes", [(1, 128, 1), (2, 64, 1), (1, 64, 2), (2, 16, 4)], ids=lambda sizes: str(sizes)
)
def test_advice_repeats_nothing_of_the_config(topology, remat, sizes):
    machine = parse_topology(topology)
    data, fsdp, tensor = sizes
    fsdp //= 128 // machine.devices
    mesh = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor, "mesh__context": 1}
    config = replace(load("7b")[0], model__remat=remat, train__grad_accum=2, **mesh)
    here = {"data": data, "fsdp": fsdp, "context": 1, "tensor": tensor}
    for factor in (1.05, 1.5, 3):
        sizes = {"bytes_per_chip": {"total": factor * machine.chip.hbm_bytes}, "mesh": here}
        lines = advice(config, machine, sizes)
        assert repeated(config, lines) == []
        policies = [line.split("remat=")[1].split()[0] for line in lines if "remat=" in line]
        assert all(kept(config, one) < kept(config, remat) for one in policies)


def kept(config, remat):
    return saved_elements_per_token(replace(config, model__remat=remat).model, chip_named("v5p"))


def test_advice_for_a_tpu_begins_with_fsdp_over_the_whole_slice():
    """The state is smallest there, and all links are used."""
    machine = parse_topology("v5p-128")
    for data, tensor in ((16, 1), (2, 1), (2, 2)):
        sizes = {"data": data, "fsdp": 64 // data // tensor, "context": 1, "tensor": tensor}
        config = replace(load("65b")[0], train__grad_accum=32)
        config = replace(config, **{f"mesh__{axis}": size for axis, size in sizes.items()})
        result = {"bytes_per_chip": {"total": 1.01 * machine.chip.hbm_bytes}, "mesh": sizes}
        first = advice(config, machine, result)[0]
        assert "--config.mesh.fsdp=64" in first and "remat" not in first
        assert ("--config.mesh.data=1" in first) == (data > 1)
        assert ("--config.mesh.tensor=1" in first) == (tensor > 1)


def test_what_divides():
    config, _ = load("13b")
    text = suggest_dividing_mesh(config, parse_topology("h100:256x8"))
    assert text.startswith("try --config.mesh.data=2 --config.mesh.fsdp=1024 ")
    assert text.endswith("--config.mesh.tensor=1 --config.train.grad_accum=1")
    text = suggest_dividing_mesh(config, parse_topology("h100:25x8"))
    assert text == "its 2048 sequences divide over 128 devices"


def test_options_are_flags():
    text = flags_for(replace(CONFIG, model__remat="full"))
    assert "--config.mesh.fsdp=-1" in text and "--config.model.remat=full" in text
    assert flags_for(CONFIG).endswith("--config.train.grad_accum=1")
