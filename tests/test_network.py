"""Seconds of a collective on a torus, counted by hand."""

import itertools

import pytest

from llama_jax.chips import chip_named
from llama_jax.hlo import Collective
from llama_jax.network import Network, Torus

V5P, V5E = chip_named("v5p"), chip_named("v5e")
SIZE = 2**30


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
        (CUBE, (0, 1, 4), 2, 2),  # three corners of a square: a ring through others
        (CUBE, range(0, 64, 4), 4, 4),  # every fourth: a plane across
        (BLOCK, range(32), 3, 7),
        (POD, range(128), 3, 15),
        (POD, range(16), 2, 8),
        (POD, range(0, 128, 16), 1, 7),
    ],
)
def test_links_that_a_group_can_use(where, group, links, hops):
    assert (where.links(tuple(group)), where.hops(tuple(group))) == (links, hops)


def test_two_devices_of_one_chip():
    pair = Torus((1, 1, 1), (False,) * 3, ((0, 0, 0), (0, 0, 0)))
    assert pair.links((0, 1)) == 0
    network = Network(chip_named("tpu7x"), [0, 0], pair)
    found = network.seconds(Collective("all-gather", "bf16", SIZE, ((0, 1),)))
    assert found == pytest.approx(SIZE / 2 / 300e9)


@pytest.mark.parametrize(
    ("kind", "group", "told", "links"),
    [
        ("all-gather", WHOLE, 0, 6),
        ("all-gather", PLANE, 0, 4),
        ("all-gather", WHOLE, 2, 2),  # one ring through all, as the compiler says
        ("all-gather", LINE, 6, 2),  # it cannot use more than there are
        ("all-reduce", WHOLE, 6, 6),
        ("reduce-scatter", LINE, 0, 2),
    ],
)
def test_seconds_on_a_torus(kind, group, told, links):
    group = tuple(group)
    one = Collective(kind, "bf16", SIZE, (group,), told)
    twice = 2 if kind == "all-reduce" else 1
    sent = twice * SIZE * (len(group) - 1) / len(group) / (600e9 * links / 6)
    assert Network(V5P, [0] * 64, CUBE).seconds(one) == pytest.approx(sent, rel=0.02)


def test_what_the_compiler_says_counts_without_a_torus():
    alone = Network(V5P, [0] * 64)
    whole = alone.seconds(Collective("all-gather", "bf16", SIZE, (tuple(WHOLE),)))
    ring = alone.seconds(Collective("all-gather", "bf16", SIZE, (tuple(WHOLE),), 2))
    assert ring == pytest.approx(3 * whole, rel=0.02)
