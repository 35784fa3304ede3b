"""The predicted seconds of a collective on a torus equal a count by hand."""

import pytest

from llama_jax.hardware.chips import chip_named
from llama_jax.hardware.topology import Torus
from llama_jax.plan.hlo import Collective
from llama_jax.plan.network import Network
from tests.hardware.test_topology import CUBE, LINE, PLANE, WHOLE

V5P, V5E = chip_named("v5p"), chip_named("v5e")
SIZE = 2**30


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
        ("all-gather", WHOLE, 2, 2),  # one ring through all devices, as the compiler reports
        ("all-gather", LINE, 6, 2),  # it cannot use more links than there are
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
