"""Reader of a compiled program's HLO text: collectives and cycles, times the loops' trip counts."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
# Opcodes that only name values and compute nothing.
_NAMES = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all")
CONTROL = ("while", "call", "conditional")  # these run other computations of the schedule
# The computations that these call are arithmetic on scalars.
_APPLYING = (*COLLECTIVES, "reduce", "sort", "scatter", "map", "reduce-window")
_BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2},
    **{"f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8},
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:, |$)")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
# The algorithm of a collective in libtpu: an emitter gathers over a number of torus dimensions, a
# strategy reduces in a number of rings. All but UniDirection use both directions of each ring.
_EMITTER = re.compile(r'"emitter":"(\d)DAllGather')
_STRATEGY = re.compile(r"\b(\w*Strategy\w*)\{colors:(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `%name = shape opcode(%operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str

    @property
    def collective(self) -> str:
        """The one of `COLLECTIVES` that the instruction is or starts; empty if there is none."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else ""

    @property
    def is_root(self) -> bool:
        """Says whether its computation returns this instruction."""
        return self.line.startswith("ROOT ")

    @property
    def op_name(self) -> str:
        """Its origin in the Python program; empty if the compiler added it."""
        found = _OP_NAME.search(self.line)
        return found[1] if found else ""

    @property
    def channel(self) -> str:
        """The channel of a collective; all pieces of a split collective share it."""
        found = _CHANNEL.search(self.line)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 if it gives none, or the largest integer, as for copies."""
        found = _CYCLES.search(self.line)
        return int(found[1]) if found and int(found[1]) < 2**62 else 0

    @property
    def called(self) -> list[str]:
        """The names of the computations that it runs."""
        if self.opcode.removesuffix("-start") in _APPLYING:
            return []
        names = _CALLED.findall(self.line)
        for group in _BRANCHES.findall(self.line):
            names += [branch.strip().lstrip("%") for branch in group.split(",")]
        return names


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, each with its instructions in the order of the schedule."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of `COLLECTIVES`.
      dtype: type of its largest part.
      size: bytes of one device's operand or result, whichever is larger.
      groups: devices of each group, by position in the mesh; empty if the HLO does not say.
      links: number of a TPU's links on which the algorithm sends at once; 0 if unknown.
    """

    kind: str
    dtype: str
    size: int
    groups: tuple[tuple[int, ...], ...]
    links: int = 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """Totals of one run of a program, on one device.

    Attributes:
      collectives: kind -> (number of runs, bytes as in `Collective.size`).
      by_dtype: the same for `kind dtype`, such as `all-gather bf16`.
      asynchronous: those of `collectives` that run in parallel with other instructions.
      synchronous: the others of `collectives`.
      lookup: number of collectives in the look-up of embeddings, without the gather of the table.
      cycles: sum of the compiler's estimates; 0 if it gives none.
    """

    collectives: dict[str, tuple[int, int]]
    by_dtype: dict[str, tuple[int, int]]
    asynchronous: dict[str, tuple[int, int]]
    synchronous: dict[str, tuple[int, int]]
    lookup: int
    cycles: int


def shape_bytes(text: str) -> int:
    """Counts the bytes of a shape such as `(f32[2,3], bf16[4])`."""
    return sum(size for _, size in _parts(text))


def hbm_bytes(text: str) -> int:
    """Counts the bytes of a shape's arrays in main memory, not in a TPU's vector memory."""
    return sum(
        _BYTES.get(dtype, 0) * math.prod(_sizes(dims))
        for dtype, dims, layout in _SHAPE.findall(text)
        if "S(" not in layout
    )


def dimensions(text: str) -> list[int]:
    """Returns the dimensions of the first array of a shape."""
    found = _SHAPE.search(text)
    return _sizes(found[2]) if found else []


def dtype_of(text: str) -> str:
    """Returns the type of the first array of a shape, such as `bf16`; empty without arrays."""
    found = _SHAPE.search(text)
    return found[1] if found else ""


def _sizes(dims: str) -> list[int]:
    return [int(size) for size in dims.split(",") if size]


def _parts(text: str) -> list[tuple[str, int]]:
    return [
        (dtype, _BYTES.get(dtype, 0) * math.prod(_sizes(dims)))
        for dtype, dims, _ in _SHAPE.findall(text)
    ]


def parse(text: str) -> Module:
    """Reads an HLO module as XLA prints it."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", ""
    for raw in text.splitlines():
        found = _COMPUTATION.match(raw) if not raw.startswith(" ") else None
        if found:
            current = found[2]
            computations[current] = {}
            entry = current if found[1] else entry
            continue
        line = raw.strip()
        one = _INSTRUCTION.match(line) if current else None
        if one:
            operands = tuple(re.findall(r"%([\w.\-]+)", one[4]))
            computations[current][one[1]] = Instruction(one[1], one[2], one[3], operands, line)
    return Module(computations, entry)


def trip_count(loop: Instruction, module: Module) -> int:
    """Returns the trip count of a `while`: the compiler's note, or N of `counter < N`; otherwise 1.

    All loops are scans, whose counters begin at 0.
    """
    noted = _TRIPS.search(loop.line)
    if noted:
        return int(noted[1])
    condition = re.findall(r"condition=%?([\w.\-]+)", loop.line)[0]
    scope = list(module.computations.get(condition, {}).values())
    for one in tuple(scope):
        for callee in one.called:  # a GPU's compiler puts the comparison into a fusion
            scope += module.computations.get(callee, {}).values()
    lines = [one.line for one in scope]
    limits = [int(n) for line in lines for n in re.findall(r" constant\((\d+)\)", line)]
    less = any("direction=LT" in line for line in lines)
    return limits[0] if less and len(limits) == 1 else 1


def _result_shape(one: Instruction) -> str:
    """Returns the result's shape; a start has (operand, result, ..), except for all-reduce."""
    if not one.opcode.endswith("-start") or one.collective == "all-reduce":
        return one.shape
    depth, parts = 0, [""]
    for letter in one.shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts[1] if len(parts) > 1 else one.shape


@functools.cache
def read_collective(one: Instruction) -> Collective:
    """Reads from a collective instruction what it sends, and among which devices."""
    groups = replica_groups(one.line)
    parts = _parts(_result_shape(one))
    size = sum(bytes_ for _, bytes_ in parts)
    if one.collective == "reduce-scatter" and groups:
        size *= len(groups[0])  # its operand is the larger side
    dtype = max(parts, key=lambda part: part[1], default=("", 0))[0]
    return Collective(one.collective, dtype, size, groups, _links(one.line))


def _links(line: str) -> int:
    emitter, strategy = _EMITTER.search(line), _STRATEGY.search(line)
    if emitter:
        return 2 * int(emitter[1])
    if strategy:
        return int(strategy[2]) * (1 if "UniDirection" in strategy[1] else 2)
    return 0


def collectives_in(one: Instruction, module: Module) -> list[Instruction]:
    """Lists the collectives that an instruction is, starts, or contains in a fusion or a call."""
    if one.collective:
        return [one]
    # A TPU7x runs collectives on its SparseCores, in parallel, by `call-start`.
    if one.opcode not in ("fusion", "call") and not one.opcode.endswith("-start"):
        return []
    inner = (module.computations.get(name, {}) for name in one.called)
    return [
        found
        for scope in inner
        for each in scope.values()
        for found in collectives_in(each, module)
    ]


@dataclasses.dataclass
class ScheduledCollective:
    """A collective in the schedule of a computation, one for each time that it is sent.

    On TPUs a collective that runs in parallel with compute is a chain of fusions: the first starts
    it, the middle ones contain a part of it and a matrix product, the last waits for it. All have
    the same channel.

    Attributes:
      collective: the data that it sends.
      instruction: its first instruction in the HLO.
      start: name of the scheduled instruction that starts it.
      end: name of the instruction that waits for it; may be `start` itself.
      asynchronous: whether instructions between `start` and `end` compute something.
    """

    collective: Collective
    instruction: Instruction
    start: str
    end: str
    asynchronous: bool = False


def collective_schedule(name: str, module: Module) -> list[ScheduledCollective]:
    """Lists the collectives of one run of a computation, in the order of their starts.

    Does not include collectives inside its loops and calls.
    """
    found: list[ScheduledCollective] = []
    chains: dict[str, ScheduledCollective] = {}
    started: dict[str, list[ScheduledCollective]] = {}
    works: dict[str, int] = {}  # number of computing instructions up to and including each
    for one in module.computations.get(name, {}).values():
        works[one.name] = len(works) and next(reversed(works.values()))
        works[one.name] += one.opcode not in _NAMES and not one.opcode.endswith(("-start", "-done"))
        if one.opcode in CONTROL:
            continue
        for each in [begun for operand in one.operands for begun in started.get(operand, ())]:
            if one.opcode.endswith("-done"):
                each.end = one.name
            elif one.opcode.endswith("-update"):
                started.setdefault(one.name, []).append(each)
        for inner in collectives_in(one, module):
            if one.opcode == "fusion" and inner.channel in chains:
                chains[inner.channel].end = one.name
                continue
            new = ScheduledCollective(read_collective(inner), inner, one.name, one.name)
            found.append(new)
            if one.opcode == "fusion" and inner.channel:
                chains[inner.channel] = new
            if one.opcode.endswith("-start") and '"is_sync":true' not in one.line:
                started.setdefault(one.name, []).append(new)
    for each in found:
        last = works[each.end] - (module.computations[name][each.end].opcode == "fusion")
        each.asynchronous = last > works[each.start]
    return found


def replica_groups(line: str) -> tuple[tuple[int, ...], ...]:
    """Reads groups of devices in any of XLA's notations; empty if there are none."""
    explicit = re.search(r"replica_groups=\{(\{.*?\})\}", line)
    if explicit:
        found = re.findall(r"\{([\d,]*)\}", explicit[1])
        return tuple(tuple(int(n) for n in group.split(",") if n) for group in found)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        sizes = _sizes(iota[3])
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        ids = ids.transpose(_sizes(iota[4])) if iota[4] else ids
        return tuple(map(tuple, ids.reshape(int(iota[1]), int(iota[2])).tolist()))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", line)
    return _named_groups(named[1], named[2], named[3]) if named else ()


def _named_groups(mesh: str, order: str, used: str) -> tuple[tuple[int, ...], ...]:
    """Reads `mesh['x'=2,'y'=8] {'x','y':(2)4}`: along all of x and the second factor, 4, of y."""
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = np.arange(math.prod(axes.values()))
    shuffled = re.search(r"\[([\d,]+)\]T\(([\d,]+)\)", order)
    if shuffled:
        ids = ids.reshape(_sizes(shuffled[1])).transpose(_sizes(shuffled[2])).reshape(-1)
    factors = {name: [size] for name, size in axes.items()}
    picked = {}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used):
        if size:
            rest = axes[name] // (int(before) * int(size))
            factors[name] = [int(before), int(size), rest]
        picked[name] = 1 if size else 0
    shape: list[int] = []
    inside = []
    for name, sizes in factors.items():
        if name in picked:
            inside.append(len(shape) + picked[name])
        shape += sizes
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    members = math.prod(shape[axis] for axis in inside)
    grouped = ids.reshape(shape).transpose([*outside, *inside]).reshape(-1, members)
    return tuple(map(tuple, grouped.tolist()))


def summarize(text: str) -> Summary:
    """Adds up the instructions of an optimised HLO module, times the trip counts of their loops.

    A loop without a known trip count, and each side of a conditional, counts once.
    """
    module = parse(text)
    found: list[tuple[ScheduledCollective, int]] = []
    cycles = lookup = 0

    def visit(name: str, times: int) -> None:
        nonlocal cycles, lookup
        for each in collective_schedule(name, module):
            found.append((each, times))
            op_name = each.instruction.op_name
            lookup += "_take" in op_name and "transpose" not in op_name
        for one in module.computations.get(name, {}).values():
            cycles += times * one.cycles  # a fusion's estimate includes its contents
            if one.opcode in CONTROL:
                inner = times * (trip_count(one, module) if one.opcode == "while" else 1)
                for callee in one.called:
                    visit(callee, inner)

    visit(module.entry, 1)
    return Summary(
        collectives=_totals((each.collective.kind, each, times) for each, times in found),
        by_dtype=_totals(
            (f"{each.collective.kind} {each.collective.dtype}", each, times)
            for each, times in found
        ),
        asynchronous=_totals(
            (each.collective.kind, each, times) for each, times in found if each.asynchronous
        ),
        synchronous=_totals(
            (each.collective.kind, each, times) for each, times in found if not each.asynchronous
        ),
        lookup=lookup,
        cycles=cycles,
    )


def _totals(entries: Iterable[tuple[str, ScheduledCollective, int]]) -> dict[str, tuple[int, int]]:
    """Sums entries by name: (number of runs, bytes)."""
    totals: dict[str, tuple[int, int]] = {}
    for name, each, times in entries:
        count, size = totals.get(name, (0, 0))
        totals[name] = (count + times, size + times * each.collective.size)
    return dict(sorted(totals.items()))
