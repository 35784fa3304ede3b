"""How long would a step take? A roofline, and a walk through the compiler's own schedule.

The device runs its instructions in the order in which the compiler put them; collectives that were
started go on beside them, one after another on the network, until their results are needed.
`calibration` compares what comes out with published runs.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax

from llama_jax.hardware.chips import Chip
from llama_jax.hardware.topology import Topology, Torus, node_of, torus_of
from llama_jax.plan.hlo import (
    CONTROL,
    Collective,
    Instruction,
    Module,
    collective_schedule,
    trip_count,
)
from llama_jax.plan.hlo_cost import flops_by_dtypes, kernel_flops, traffic
from llama_jax.plan.network import Network


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
      exposed_by_kind: the same for each kind of collective, such as `all-gather`.
      cycles: seconds of the compiler's estimates, and attention kernels; None where it has none.
      step: the prediction.
    """

    flops: float
    memory_bytes: float
    compute: float
    memory: float
    network: float
    exposed: float
    exposed_by_kind: dict[str, float]
    cycles: float | None
    step: float


@dataclasses.dataclass
class _Totals:
    flops: float = 0.0
    at_peak: float = 0.0
    memory_bytes: float = 0.0
    network: float = 0.0
    cycles: float = 0.0
    waits: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "_Totals", times: int) -> None:
        for field in ("flops", "at_peak", "memory_bytes", "network", "cycles"):
            setattr(self, field, getattr(self, field) + times * getattr(other, field))
        for kind, seconds in other.waits.items():
            self.waits[kind] += times * seconds


class _Schedule:
    """The walk, on a chip and its network."""

    def __init__(
        self, module: Module, chip: Chip, nodes: Sequence[int], torus: Torus | None = None
    ):
        self.module, self.chip = module, chip
        self.network_seconds = Network(chip, nodes, torus).seconds
        self.run = functools.cache(self._run)

    def seconds_of(self, one: Instruction, scope: dict[str, Instruction], totals: _Totals) -> float:
        """Of an instruction that is no collective and no loop."""
        chip, moved = self.chip, traffic(one, scope, self.module)
        work = flops_by_dtypes(one, scope, self.module)
        at_peak = sum(flops / chip.peak_of(*dtypes) for dtypes, flops in work.items())
        totals.flops += sum(work.values())
        totals.at_peak += at_peak
        totals.memory_bytes += moved
        kernel = kernel_flops(one) / (chip.attention_efficiency * chip.peak_flops)
        if chip.clock and (one.cycles or kernel):
            totals.cycles += one.cycles / chip.clock + kernel
            return one.cycles / chip.clock + kernel
        if kernel:
            return kernel
        # Cycles of a TPU leave out what overlaps with them: copies between its memories.
        if chip.clock:
            return 0.0
        return max(at_peak / chip.matmul_efficiency, moved / chip.hbm_bandwidth)

    def _run(self, name: str) -> tuple[float, _Totals]:
        """Seconds of a computation, the network idle at first, and what it did."""
        now = network_free = 0.0
        totals = _Totals()
        starts: dict[str, list[Collective]] = {}
        ends: dict[str, list[tuple[str, str]]] = {}  # kinds and starts of those that it waits for
        for each in collective_schedule(name, self.module):
            starts.setdefault(each.start, []).append(each.collective)
            ends.setdefault(each.end, []).append((each.collective.kind, each.start))
        arrives: dict[tuple[str, str], float] = {}
        scope = self.module.computations.get(name, {})
        for one in scope.values():
            if one.opcode in CONTROL:
                times = trip_count(one, self.module) if one.opcode == "while" else 1
                for callee in one.called:
                    seconds, inner = self.run(callee)
                    now += times * seconds
                    totals.add(inner, times)
                continue
            for collective in starts.get(one.name, ()):
                seconds = self.network_seconds(collective)
                totals.network += seconds
                network_free = max(now, network_free) + seconds
                arrives[collective.kind, one.name] = network_free
            waited = [key for key in ends.get(one.name, ()) if key in arrives]
            idle = one.collective or one.opcode.endswith("-done")
            busy = 0.0 if idle else self.seconds_of(one, scope, totals)
            # The end of a chain waits, and then goes on; what is sent within one instruction goes
            # on beside what else that computes.
            for kind, start in waited:
                if start != one.name:
                    now = self._wait(now, kind, arrives[kind, start], totals)
            now += busy
            for kind, start in waited:
                if start == one.name:
                    now = self._wait(now, kind, arrives[kind, start], totals)
        if network_free > now:
            last = max(arrives, key=lambda key: arrives[key])
            now = self._wait(now, last[0], network_free, totals)
        return now, totals

    def _wait(self, now: float, kind: str, until: float, totals: _Totals) -> float:
        if until > now:
            totals.waits[kind] += until - now  # type: ignore[assignment]
        return max(now, until)


def predict_on(
    topology: Topology, devices: Sequence[jax.Device], module: Module, chip: Chip | None = None
) -> Prediction:
    """`predict` for the devices of a mesh on a machine.

    Args:
      topology: the machine.
      devices: those of the mesh, in its order.
      module: as of `predict`.
      chip: another one than the machine's.
    """
    nodes = [node_of(device) for device in devices]
    return predict(module, chip or topology.chip, nodes, torus_of(topology, devices))


def predict(
    module: Module, chip: Chip, nodes: Sequence[int], torus: Torus | None = None
) -> Prediction:
    """Times of one step of a compiled program.

    Args:
      module: the optimised HLO.
      chip: on which it runs.
      nodes: for each device of the mesh, in order, the node or slice in which it is.
      torus: of a TPU slice, where the devices are in it; None: all links serve any group.
    """
    seconds, totals = _Schedule(module, chip, nodes, torus).run(module.entry)
    memory = totals.memory_bytes / chip.hbm_bandwidth
    return Prediction(
        flops=totals.flops,
        memory_bytes=totals.memory_bytes,
        compute=totals.at_peak,
        memory=memory,
        network=totals.network,
        exposed=sum(totals.waits.values()),
        exposed_by_kind={kind: float(wait) for kind, wait in sorted(totals.waits.items())},
        cycles=totals.cycles or None,
        step=max(seconds, totals.at_peak, memory),
    )
