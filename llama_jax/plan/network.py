"""The time of a collective on the network of a machine, from its links, torus and nodes."""

import dataclasses
import math
from collections.abc import Sequence

from llama_jax.hardware.chips import Chip
from llama_jax.hardware.topology import Torus
from llama_jax.plan.hlo import Collective

# Seconds per hop of a ring. Over NVLink and the network these are NCCL's own (protocol LL128 in its
# src/graph/tuning.cc); the value for a TPU's link is an assumption.
_NVLINK_HOP, _NETWORK_HOP, _ICI_HOP = 1.9e-6, 4.0e-6, 1e-6


@dataclasses.dataclass(frozen=True)
class Network:
    """The network that connects the devices of a mesh.

    Attributes:
      chip: the chip of the devices.
      nodes: for each device of the mesh, in order, the index of its node or slice.
      torus: the torus of a TPU slice; None: all links of a chip serve any group.
    """

    chip: Chip
    nodes: Sequence[int]
    torus: Torus | None = None

    def seconds(self, one: Collective) -> float:
        """Computes the seconds of one collective, in rings that pass data from device to device."""
        group = one.groups[0] if one.groups else range(len(self.nodes))
        members = len(group)
        if members == 1:
            return 0.0
        spanned = len({self.nodes[device] for device in group})
        local = max(1, members // spanned)
        twice = 2 if one.kind == "all-reduce" else 1
        sent = twice * one.size * (1 if "permute" in one.kind else (members - 1) / members)
        # All cards of a node together carry the data that its members need from other nodes.
        cards = local if one.kind in ("all-gather", "all-reduce", "reduce-scatter") else 1
        speed = self._link_bandwidth(one, group)
        if spanned > 1:
            speed = min(speed, cards * self.chip.network_bandwidth)
        delay = twice * (self._hop_seconds(group, spanned, local) + (spanned - 1) * _NETWORK_HOP)
        if one.kind == "all-reduce":  # small ones may use a tree
            tree = 2 * (math.log2(spanned) * _NETWORK_HOP + (local - 1) * _NVLINK_HOP)
            delay = min(delay, tree)
        return sent / speed + delay

    def _link_bandwidth(self, one: Collective, group: Sequence[int]) -> float:
        """Returns the bytes/s into a device, given the algorithm and the place of the group."""
        there = 2 * self.chip.torus or 1
        links = self.torus.links(group) if self.torus else there
        return self.chip.link_bandwidth * min(links or there, one.links or there) / there

    def _hop_seconds(self, group: Sequence[int], spanned: int, local: int) -> float:
        if self.torus is not None:
            return self.torus.hops(group) * _ICI_HOP
        if self.chip.torus:
            return self.chip.torus * local ** (1 / self.chip.torus) * _ICI_HOP
        return spanned * (local - 1) * _NVLINK_HOP
