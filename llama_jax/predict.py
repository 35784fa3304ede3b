"""How long would a step take? A roofline, and a walk through the compiler's own schedule.

The device runs its instructions in the order in which the compiler put them; collectives that were
started go on beside them, one after another on the network, until their results are needed. This
has not been calibrated on hardware.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

from llama_jax.chips import Chip
from llama_jax.hlo import Collective, Instruction, Module, read_collective, trip_count
from llama_jax.hlo_cost import flops, kernel_flops, traffic

# Seconds per hop of a ring: NCCL's own, over NVLink and over the network (protocol LL128 in its
# src/graph/tuning.cc); a TPU's link is an assumption.
_NVLINK_HOP, _NETWORK_HOP, _ICI_HOP = 1.9e-6, 4.0e-6, 1e-6


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a step would take; seconds, FLOPs and bytes of one device.

    Attributes:
      flops: that the device does, recomputation and attention kernels included.
      memory_bytes: read from and written to its memory.
      compute: seconds of the FLOPs at the chip's peak.
      memory: seconds of these bytes at the memory's bandwidth.
      network: seconds of all collectives, one after another.
      exposed: seconds that the device waits for them, in the compiler's schedule.
      cycles: seconds of the compiler's estimates, and attention kernels; None where it has none.
      step: the prediction.
    """

    flops: float
    memory_bytes: float
    compute: float
    memory: float
    network: float
    exposed: float
    cycles: float | None
    step: float


@dataclasses.dataclass
class _Totals:
    flops: float = 0.0
    memory_bytes: float = 0.0
    network: float = 0.0
    cycles: float = 0.0

    def add(self, other: "_Totals", times: int) -> None:
        for field in dataclasses.fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + times * getattr(other, name))


class _Schedule:
    """The walk; `nodes` says for each device of the mesh, in order, in which node it is."""

    def __init__(self, module: Module, chip: Chip, nodes: Sequence[int], network: bool = True):
        self.module, self.chip, self.nodes, self.network = module, chip, nodes, network
        self.run = functools.cache(self._run)

    def seconds_of(self, one: Instruction, scope: dict[str, Instruction], totals: _Totals) -> float:
        """Of an instruction that is no collective and no loop."""
        work, moved = flops(one, scope, self.module), traffic(one, scope, self.module)
        totals.flops += work
        totals.memory_bytes += moved
        kernel = kernel_flops(one) / (self.chip.attention_efficiency * self.chip.peak_flops)
        if self.chip.clock and (one.cycles or kernel):
            totals.cycles += one.cycles / self.chip.clock + kernel
            return one.cycles / self.chip.clock + kernel
        if kernel:
            return kernel
        # Cycles of a TPU leave out what overlaps with them: copies between its memories.
        if self.chip.clock:
            return 0.0
        reached = self.chip.matmul_efficiency * self.chip.peak_flops
        return max(work / reached, moved / self.chip.hbm_bandwidth)

    def _run(self, name: str) -> tuple[float, _Totals]:
        """Seconds of a computation, the network idle at first, and what it did."""
        now = network_free = 0.0
        totals = _Totals()
        pending: dict[str, float] = {}
        scope = self.module.computations.get(name, {})
        for one in scope.values():
            if one.opcode in ("while", "call", "conditional"):
                times = trip_count(one, self.module) if one.opcode == "while" else 1
                for callee in one.called:
                    seconds, inner = self.run(callee)
                    now += times * seconds
                    totals.add(inner, times)
                continue
            if one.opcode.endswith("-done"):
                now = max(now, *(pending.get(operand, 0.0) for operand in one.operands))
                continue
            sent = sum(self.network_seconds(each) for each in self.collectives(one))
            totals.network += sent
            busy = 0.0 if one.collective else self.seconds_of(one, scope, totals)
            if not sent:
                now += busy
                continue
            network_free = max(now, network_free) + sent
            if one.opcode.endswith("-start"):
                pending[one.name] = network_free
            else:
                now = max(now + busy, network_free)
        return max(now, network_free), totals

    def collectives(self, one: Instruction) -> list[Collective]:
        """That an instruction is or holds: fusions of compute and a collective, and wrappers."""
        if one.collective:
            return [read_collective(one)]
        # A TPU7x calls them to run on its SparseCores, beside the rest: `call-start`.
        if one.opcode not in ("fusion", "call") and not one.opcode.endswith("-start"):
            return []
        inner = (self.module.computations.get(name, {}) for name in one.called)
        return [found for scope in inner for x in scope.values() for found in self.collectives(x)]

    def network_seconds(self, one: Collective) -> float:
        """Of one collective, as rings: each device passes on what the others have."""
        group = one.groups[0] if one.groups else range(len(self.nodes))
        members = len(group)
        if members == 1 or not self.network:
            return 0.0
        spanned = len({self.nodes[device] for device in group})
        local = max(1, members // spanned)
        twice = 2 if one.kind == "all-reduce" else 1
        sent = twice * one.size * (1 if "permute" in one.kind else (members - 1) / members)
        # The cards of a node carry together what its members of the group need from outside.
        cards = local if one.kind in ("all-gather", "all-reduce", "reduce-scatter") else 1
        outside = cards * self.chip.network_bandwidth
        speed = min(self.chip.link_bandwidth, outside) if spanned > 1 else self.chip.link_bandwidth
        if self.chip.torus:
            hops = self.chip.torus * local ** (1 / self.chip.torus) * _ICI_HOP
        else:
            hops = spanned * (local - 1) * _NVLINK_HOP
        delay = twice * (hops + (spanned - 1) * _NETWORK_HOP)
        if one.kind == "all-reduce":  # or a tree, for small ones
            tree = 2 * (math.log2(spanned) * _NETWORK_HOP + (local - 1) * _NVLINK_HOP)
            delay = min(delay, tree)
        return sent / speed + delay


def predict(module: Module, chip: Chip, nodes: Sequence[int]) -> Prediction:
    """Times of one step of a compiled program.

    Args:
      module: the optimised HLO.
      chip: on which it runs.
      nodes: for each device of the mesh, in order, the node or slice in which it is.
    """
    seconds, totals = _Schedule(module, chip, nodes).run(module.entry)
    compute = totals.flops / chip.peak_flops
    memory = totals.memory_bytes / chip.hbm_bandwidth
    alone, _ = _Schedule(module, chip, nodes, network=False).run(module.entry)
    return Prediction(
        flops=totals.flops,
        memory_bytes=totals.memory_bytes,
        compute=compute,
        memory=memory,
        network=totals.network,
        exposed=seconds - alone,
        cycles=totals.cycles or None,
        step=max(seconds, compute, memory),
    )
