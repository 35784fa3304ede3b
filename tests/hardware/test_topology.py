import contextlib
import importlib.util
import itertools
import os
import re
from types import SimpleNamespace

import jax
import pytest

from llama_jax.errors import UserError
from llama_jax.hardware.chips import CHIPS, chip_named, find_chip
from llama_jax.hardware.topology import (
    Torus,
    captured_stderr,
    node_of,
    parse_topology,
    target_config,
    topology_devices,
    torus_of,
)


@pytest.mark.parametrize(
    ("name", "chip", "shape"),
    [
        ("v5p-1024", "v5p", (8, 8, 8)),
        ("v5p-128", "v5p", (4, 4, 4)),
        ("v5p-8", "v5p", (2, 2, 1)),
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
        ("h100:8x8x8", "give nodes x GPUs of a node (up to 8), such as h100:256x8"),
        ("h100:2x16", "give nodes x GPUs"),
        ("h100-2048", "or one node, h100:8"),
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


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("v4:4x4x4", (True, True, True)),
        ("v4:2x2x4", (False, False, False)),
        ("v4:2x4x4", (False, False, False)),
        ("v5p:2x2x1", (False, False, False)),
        ("v5p:4x4x8", (True, True, True)),
        ("v5p-2048", (True, True, True)),
        ("v5p:4x4x6", (False, False, False)),
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v6e:16x8", (True, False)),
        ("v6e:8x8", (False, False)),
        ("tpu7x:4x4x4", (True, True, True)),
        ("tpu7x:2x2x1", (False, False, False)),
    ],
)
def test_where_a_slice_wraps_around(monkeypatch, name, wrap):
    """The compiler gets this too, always for three dimensions."""
    from jax.experimental import topologies

    asked = {}

    def describe(**options):
        asked.update(options)
        return SimpleNamespace(devices=[])

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    topology = parse_topology(name)
    assert topology.wrap == wrap
    topology_devices(topology)
    assert asked["wrap"] == (*wrap, False)[:3] and asked["topology_name"] == name_of_slice(topology)


def name_of_slice(topology):
    return f"{topology.chip.name}:{'x'.join(map(str, topology.shape))}"


def torus(shape, wrap):
    return Torus(shape, wrap, tuple(itertools.product(*(range(size) for size in shape))))


CUBE = torus((4, 4, 4), (True, True, True))
BLOCK = torus((4, 4, 2), (False, False, False))
POD = torus((8, 16), (False, True))
LINE, PLANE, WHOLE = range(4), range(16), range(64)  # along z, along y and z, all


@pytest.mark.parametrize(
    ("where", "group", "links", "hops"),
    [
        (CUBE, WHOLE, 6, 6),
        (CUBE, PLANE, 4, 4),
        (CUBE, LINE, 2, 2),
        (CUBE, (0, 1), 1, 1),  # neighbours
        (CUBE, (0, 1, 4), 2, 2),  # three corners of a square: the ring passes through other devices
        (CUBE, range(0, 64, 4), 4, 4),  # every fourth device: a plane across
        (BLOCK, range(32), 3, 7),
        (POD, range(128), 3, 15),
        (POD, range(16), 2, 8),
        (POD, range(0, 128, 16), 1, 7),
    ],
)
def test_links_that_a_group_can_use(where, group, links, hops):
    assert (where.links(tuple(group)), where.hops(tuple(group))) == (links, hops)


def test_where_devices_lie_on_a_torus():
    devices = [SimpleNamespace(coords=(x, y, 0), platform="tpu") for x in range(2) for y in (0, 1)]
    torus = torus_of(parse_topology("v5e:2x2"), devices)
    assert torus.coords == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert (torus.shape, torus.wrap) == ((2, 2), (False, False))
    assert torus_of(parse_topology("h100:8"), devices) is None
    assert torus_of(parse_topology("v5e:2x2"), jax.devices()) is None  # CPUs stand in for the chips


def test_products_are_as_fast_as_their_types():
    v5p, v6e, h100, a100 = (chip_named(name) for name in ("v5p", "v6e", "h100", "a100-80g"))
    assert v5p.peak_of("bf16", "bf16") == v5p.peak_of() == v5p.peak_of("f32", "f32") == 459e12
    assert v5p.peak_of("s8", "s8") == 918e12 and v5p.peak_of("f8e4m3fn", "f8e5m2") == 459e12
    assert v6e.peak_of("s8", "s8") == 1836e12 and h100.peak_of("f8e4m3fn", "f8e4m3fn") == 1978e12
    assert a100.peak_of("f8e4m3fn", "f8e4m3fn") == 312e12 and a100.peak_of("s8", "u8") == 624e12
    # One operand of 8 bits is made as wide as the other.
    assert h100.peak_of("s8", "bf16") == h100.peak_of("f8e4m3fn", "s8") == 989e12


def test_the_table_of_chips():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    assert chip_named("h100").peak_flops == 989e12
    assert find_chip("TPU v5 lite").name == "v5e" and find_chip("TPU v5p").name == "v5p"
    assert find_chip("cpu") is None and chip_named("v9") is None


@pytest.mark.parametrize(
    ("name", "shape", "chips"),
    [("h100:256x8", (256, 8), 2048), ("a100-80g:2x4", (2, 4), 8), ("b200:8", (1, 8), 8)],
)
def test_nodes_of_gpus(name, shape, chips):
    topology = parse_topology(name)
    assert (topology.shape, topology.chips, topology.devices) == (shape, chips, chips)


def test_slices_and_chips_of_two_devices():
    topology = parse_topology("v5e-256", slices=2)
    assert topology.chips == 512 and str(topology) == "v5e:16x16 x 2 slices"
    topology = parse_topology("tpu7x-128")
    assert (topology.shape, topology.chips, topology.devices) == ((4, 4, 4), 64, 128)


def test_slices_are_of_tpus():
    with pytest.raises(UserError, match="for GPUs, give more nodes"):
        parse_topology("h100:2x8", slices=2)
    with pytest.raises(UserError, match="--slices must be positive, got 0"):
        parse_topology("v5e-256", slices=0)


def test_what_the_compiler_is_told_of_a_gpu():
    text = target_config(chip_named("h100"))
    assert "core_count: 132 " in text and "major: 9 minor: 0" in text
    assert 'device_description_str: "H100 80GB HBM3"' in text
    assert "ACCELERATED_FEATURES" in text
    assert "ACCELERATED" not in target_config(chip_named("a100-80g"))
    gpus = {"a100-80g", "h100", "h200", "b200", "rtx4090", "l40s"}
    assert {chip.name for chip in CHIPS if chip.target} == gpus


@pytest.mark.parametrize(("name", "extra"), [("v5p-128", "tpu"), ("h100:8", "cuda13")])
def test_a_missing_compiler_says_what_to_install(monkeypatch, name, extra):
    from jax.experimental import topologies

    def missing(**_):
        raise RuntimeError("Unknown backend: it is not installed")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(UserError, match=re.escape(f"pip install '.[{extra}]'")):
        topology_devices(parse_topology(name))


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="the compiler is there"
)
def test_without_the_compiler_of_gpus():
    with pytest.raises(UserError, match=re.escape("pip install '.[cuda13]'")):
        topology_devices(parse_topology("h100:8"))


@pytest.mark.parametrize("name", ["v5p-8", "h100:8"])
def test_the_environment_stays_as_it_was(name, monkeypatch):
    """Otherwise, processes that this one starts later would behave as on a TPU host."""
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    before = dict(os.environ)
    with contextlib.suppress(UserError):  # the compiler may be missing
        topology_devices(parse_topology(name))
    assert dict(os.environ) == before


def test_what_a_library_writes_is_kept():
    with captured_stderr() as said:
        os.write(2, b"one\ntwo\n")
        assert said == []
    assert said == ["one", "two"]


def test_nodes_and_slices():
    gpu = SimpleNamespace(platform="gpu", process_index=3, slice_index=0)
    tpu = SimpleNamespace(platform="tpu", process_index=3, slice_index=1)
    assert (node_of(gpu), node_of(tpu), node_of(jax.devices()[0])) == (3, 1, 0)
