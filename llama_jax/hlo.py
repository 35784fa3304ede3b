"""What a compiled program does, read from its HLO text: collectives and cycles, loops counted."""

import collections
import dataclasses
import math
import re

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
_BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2},
    **{"f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8},
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Summary:
    """Totals of one run of a program, on one device.

    Attributes:
      collectives: kind -> (how often, bytes of the results).
      cycles: sum of the compiler's estimates; 0 where it gives none.
    """

    collectives: dict[str, tuple[int, int]]
    cycles: int


def shape_bytes(text: str) -> int:
    """Bytes of a shape such as `(f32[2,3], bf16[4])`."""
    sizes = [
        _BYTES.get(dtype, 0) * math.prod(int(size) for size in dims.split(",") if size)
        for dtype, dims in _SHAPE.findall(text)
    ]
    return sum(sizes)


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
    """Of a `while`: what the compiler notes, or N of a condition `counter < N`; otherwise 1.

    The counters of scans, which are all the loops that there are, begin at 0.
    """
    noted = _TRIPS.search(line)
    if noted:
        return int(noted[1])
    condition = computations.get(re.findall(r"condition=%?([\w.\-]+)", line)[0], [])
    limits = [int(n) for one in condition for n in re.findall(r" constant\((\d+)\)", one)]
    less = any("direction=LT" in one for one in condition)
    return limits[0] if less and len(limits) == 1 else 1


def summarize(text: str) -> Summary:
    """Adds up the instructions of an optimised HLO module, times the trip counts of their loops.

    Loops without a known trip count, and both sides of a conditional, count once.
    """
    computations: dict[str, list[str]] = {}
    entry, current = "", ""
    for raw in text.splitlines():
        line = raw.strip()
        found = _COMPUTATION.match(line) if not raw.startswith(" ") else None
        if found:
            current = found[2]
            computations[current] = []
            entry = current if found[1] else entry
        elif current and " = " in line:
            computations[current].append(line)
    counts: collections.Counter[str] = collections.Counter()
    sizes: collections.Counter[str] = collections.Counter()
    cycles = 0

    def visit(name: str, times: int, fused: bool) -> None:
        nonlocal cycles
        for line in computations.get(name, ()):
            instruction = _INSTRUCTION.match(line)
            if instruction is None:
                continue
            shape, opcode = instruction[1], instruction[2]
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                size = shape_bytes(shape)
                if opcode != kind and kind != "all-reduce":
                    size //= 2  # a start's shape is (operand, result)
                counts[kind] += times
                sizes[kind] += times * size
            estimate = _CYCLES.search(line)
            if estimate and not fused:  # a fusion's estimate covers what is in it
                cycles += times * int(estimate[1])
            inner = times * (_trip_count(line, computations) if opcode == "while" else 1)
            called = _CALLED.findall(line)
            for group in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in group.split(",")]
            if kind in COLLECTIVES or opcode in (
                "reduce",
                "sort",
                "scatter",
                "map",
                "reduce-window",
            ):
                continue  # what they apply is arithmetic on scalars
            for callee in called:
                visit(callee, inner, fused or opcode == "fusion")

    visit(entry, 1, False)
    return Summary({kind: (counts[kind], sizes[kind]) for kind in sorted(counts)}, cycles)
