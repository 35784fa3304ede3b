"""Prediction of the time of a step: a roofline, and a walk through the compiler's own schedule.

The device runs instructions in the order of the schedule. Collectives that were started run in
parallel, one after another on the network, until their results are needed. `calibration` compares
the predictions with published runs.
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
    """The predicted costs of a step; seconds, FLOPs and bytes are those of one device.

    Attributes:
      flops: FLOPs, including recomputation and attention kernels.
      memory_bytes: bytes read from and written to the device's memory.
      compute: seconds for `flops` at the chip's peak.
      memory: seconds for `memory_bytes` at the memory's bandwidth.
      network: seconds of all collectives, one after another.
      exposed: seconds that the device waits for collectives in the compiler's schedule.
      exposed_by_kind: `exposed` by kind of collective, such as `all-gather`.
      cycles: seconds by the compiler's estimates, with attention kernels; None without estimates.
      step: the predicted seconds of the step.
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
    """Walks through a schedule, on a chip and its network."""

    def __init__(
        self, module: Module, chip: Chip, nodes: Sequence[int], torus: Torus | None = None
    ):
        self.module, self.chip = module, chip
        self.network_seconds = Network(chip, nodes, torus).seconds
        self.run = functools.cache(self._run)

    def seconds_of(self, one: Instruction, scope: dict[str, Instruction], totals: _Totals) -> float:
        """Returns the seconds of an instruction, not a collective or loop, and adds to the totals.

        Args:
          one: the instruction.
          scope: the instructions of its computation, by name.
          totals: the sums, which are changed.
        """
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
        # A TPU's cycles leave out copies between its memories, which overlap with them.
        if chip.clock:
            return 0.0
        return max(at_peak / chip.matmul_efficiency, moved / chip.hbm_bandwidth)

    def _run(self, name: str) -> tuple[float, _Totals]:
        """Returns the seconds of a computation that starts with an idle network, and its totals."""
        now = network_free = 0.0
        totals = _Totals()
        starts: dict[str, list[Collective]] = {}
        ends: dict[
            str, list[tuple[str, str]]
        ] = {}  # kinds and starts of the collectives that end here
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
            # The end of a chain waits and then computes; a collective inside one instruction runs
            # in parallel with the rest of that instruction.
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
    """Predicts the time of a step on the devices of a mesh; see `predict`.

    Args:
      topology: the machine.
      devices: the devices of the mesh, in its order.
      module: the optimised HLO.
      chip: replaces the machine's chip; None: use the machine's.
    """
    nodes = [node_of(device) for device in devices]
    return predict(module, chip or topology.chip, nodes, torus_of(topology, devices))


def predict(
    module: Module, chip: Chip, nodes: Sequence[int], torus: Torus | None = None
) -> Prediction:
    """Predicts the time of one step of a compiled program.

    Args:
      module: the optimised HLO.
      chip: the chip that runs it.
      nodes: for each device of the mesh, in order, the index of its node or slice.
      torus: the places of the devices in a TPU slice; None: all links serve any group.
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
