"""Machines that you do not have: their names, and their devices as compilers describe them."""

import contextlib
import dataclasses
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from llama_jax.errors import UserError, first_line
from llama_jax.hardware.chips import CHIPS, Chip, chip_named

GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of TPU chips, or nodes of GPUs.

    Attributes:
      chip: the kind of chip.
      shape: chips along each dimension of a slice's torus, or (nodes, GPUs per node).
      slices: the number of slices; 1 for GPUs.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """The number of chips."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """The number of JAX devices."""
        return self.chips * self.chip.devices_per_chip

    @property
    def wrap(self) -> tuple[bool, ...]:
        """For each dimension of a TPU slice's network, whether it wraps around to a ring.

        In 3-D networks optical switches join cubes of 4 x 4 x 4 chips: slices of whole cubes are
        tori, smaller slices are not. In 2-D networks only a dimension of the whole pod, 16 chips,
        wraps around (cloud.google.com/tpu/docs/system-architecture-tpu-vm; arXiv:2304.01433).
        """
        if self.chip.torus == 3:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        return tuple(size == 16 for size in self.shape)

    @property
    def slice_name(self) -> str:
        """The name of one slice, such as `v5p:8x8x8`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return self.slice_name + (f" x {self.slices} slices" if self.slices > 1 else "")


@dataclasses.dataclass(frozen=True)
class Torus:
    """The ICI network of a TPU slice.

    Attributes:
      shape: chips along each dimension.
      wrap: for each dimension, whether it wraps around.
      coords: coordinates of the chip of each device of the mesh, in the mesh's order.
    """

    shape: tuple[int, ...]
    wrap: tuple[bool, ...]
    coords: tuple[tuple[int, ...], ...]

    def links(self, group: Sequence[int]) -> int:
        """Counts the links of a chip, in one direction, that a collective of a group can use.

        A group has two links along each dimension that it fills and that wraps around, and one link
        along each other dimension. A group that is not a box of chips has two, as in one ring; a
        group on one chip has none.
        """
        sizes = self.extent(group)
        if math.prod(sizes) != len({self.coords[device] for device in group}):
            return 2
        return sum(
            2 if wraps and size == whole else size > 1
            for size, whole, wraps in zip(sizes, self.shape, self.wrap, strict=True)
        )

    def hops(self, group: Sequence[int]) -> int:
        """Counts the links between the two devices of a group that are farthest apart."""
        return sum(
            size // 2 if wraps and size == whole else size - 1
            for size, whole, wraps in zip(self.extent(group), self.shape, self.wrap, strict=True)
        )

    def extent(self, group: Sequence[int]) -> list[int]:
        """Counts the different coordinates of a group along each dimension."""
        chips = [self.coords[device] for device in group]
        return [len({chip[axis] for chip in chips}) for axis in range(len(self.shape))]


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Parses the name of a machine.

    Args:
      name: `v5p-1024` (the cloud's name), `v5p:8x8x8` (chips along each dimension) or `h100:256x8`
        (nodes x GPUs). The cloud's name counts TensorCores for v4, v5p and tpu7x, and chips for v5e
        and v6e.
      slices: the number of TPU slices.

    Raises:
      UserError: the chip is unknown, or its slices do not have this size or shape.
    """
    found = re.fullmatch(r"([a-z][\w-]*?)(?:-(\d+)|:(\d+(?:x\d+)*))", name)
    chip = chip_named(found[1]) if found else None
    if found is None or chip is None:
        tpus = ", ".join(chip.name for chip in CHIPS if chip.torus)
        gpus = ", ".join(chip.name for chip in CHIPS if not chip.torus)
        raise UserError(
            f"unknown topology {name!r}; try v5p-1024 or v5p:8x8x8 (TPUs: {tpus}), or nodes x GPUs "
            f"such as h100:256x8 (GPUs: {gpus})"
        )
    if slices < 1:
        raise UserError(f"--slices must be positive, got {slices}")
    shape = tuple(map(int, found[3].split("x"))) if found[3] else ()
    if not chip.torus:
        return _gpu_topology(name, chip, shape, slices)
    if shape:
        if len(shape) != chip.torus or 0 in shape:
            raise UserError(f"{name}: a slice of {chip.name} has {chip.torus} dimensions")
        return Topology(chip, shape, slices)
    chips, rest = divmod(int(found[2]), chip.cores_per_chip)
    shape_of = _cube(chips, chip.torus) if chips and not rest else None
    if shape_of is None:
        example = "x".join(["4"] * chip.torus)
        raise UserError(f"there is no slice {name}; give its shape, such as {chip.name}:{example}")
    return Topology(chip, shape_of, slices)


def _gpu_topology(name: str, chip: Chip, shape: tuple[int, ...], slices: int) -> Topology:
    if len(shape) == 1:
        shape = (1, *shape)
    if len(shape) != 2 or 0 in shape or shape[1] > GPUS_PER_NODE:
        raise UserError(
            f"{name}: give nodes x GPUs of a node (up to {GPUS_PER_NODE}), such as "
            f"{chip.name}:256x8, or one node, {chip.name}:8"
        )
    if slices > 1:
        raise UserError("--slices is for TPUs; for GPUs, give more nodes")
    return Topology(chip, shape)


def _cube(chips: int, dimensions: int) -> tuple[int, ...] | None:
    """Returns the most cubic shape of a number of chips; large 3-D slices have 4x4x4 cubes."""
    unit = 4 if dimensions == 3 and chips >= 64 else 1
    best = None
    for first in range(unit, chips + 1, unit):
        if chips % first:
            continue
        rest = chips // first
        tails = (
            [(rest,)]
            if dimensions == 2
            else [
                (second, rest // second)
                for second in range(unit, rest + 1, unit)
                if rest % second == 0 and rest // second % unit == 0
            ]
        )
        for tail in tails:
            shape = tuple(sorted((first, *tail)))
            shape = shape[::-1] if shape[0] == 1 else shape  # a host has 2 x 2 x 1 chips
            if best is None or max(shape) - min(shape) < max(best) - min(best):
                best = shape
    return best


def topology_devices(topology: Topology) -> list[jax.Device]:
    """Returns descriptions of the devices, from the compiler of the platform.

    Raises:
      UserError: the compiler is not installed, or does not know such a slice.
    """
    chip = topology.chip
    options: dict[str, Any]
    # Read when a compiler is loaded. A higher level hides warnings about inefficient shardings.
    variables = dict.fromkeys(
        ("TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL", "TF_CPP_MIN_LOG_LEVEL"), "1"
    )
    if chip.torus:
        options = {"platform": "tpu", "topology_name": topology.slice_name}
        # Without wrap, the compiler assumes a mesh without wrap-around: other collectives.
        options["wrap"] = (*topology.wrap, False, False)[:3]  # always three
        if chip.name == "v4":
            options["chip_config_name"] = "megacore"
        if topology.slices > 1:
            options["num_slices"] = topology.slices
        # Use the compiler alone, without queries to a cloud's metadata server.
        alone = {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": "",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
        variables |= {name: os.environ.get(name, value) for name, value in alone.items()}
    else:
        options = {
            "platform": "cuda",
            "topology": "1x" + "x".join(map(str, topology.shape)),  # slices, nodes, GPUs
            "target_config": target_config(chip),
        }
    try:
        with _environment(variables), captured_stderr():
            described = topologies.get_topology_desc(**options)
    except Exception as error:  # JAX and the plugins raise errors of any type
        reason = first_line(error)
        missing = re.search("not (installed|implemented|found|known)|nknown backend", reason)
        extra = "tpu" if chip.torus else "cuda13"
        hint = f"; pip install '.[{extra}]' brings its compiler" if missing else ""
        raise UserError(f"no topology {topology}: {reason}{hint}") from error
    return list(described.devices)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets variables inside the block only; outside, they would make this look like a TPU host."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def target_config(chip: Chip) -> str:
    """Returns XLA's GpuTargetConfigProto of a GPU, in text format."""
    gpu = chip.target
    assert gpu is not None
    extension = "ACCELERATED_FEATURES" if gpu.accelerated else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {gpu.shared_per_block}
  shared_memory_per_core: {gpu.shared_per_core}
  core_count: {gpu.cores} fpus_per_core: {gpu.fpus} clock_rate_ghz: {gpu.clock_ghz}
  l2_cache_size: {gpu.l2} memory_bandwidth: {int(chip.hbm_bandwidth)}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{
    major: {gpu.capability[0]} minor: {gpu.capability[1]} feature_extension: {extension}
  }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0" ecc_enabled: true device_interconnect_info {{ active_links: {gpu.links} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.kind}"
"""


def torus_of(topology: Topology, devices: Sequence[jax.Device]) -> Torus | None:
    """Locates devices in the network of their slice; returns None for GPUs."""
    dimensions = topology.chip.torus
    if not all(hasattr(device, "coords") for device in devices) or not dimensions:
        return None
    coords = tuple(tuple(device.coords[:dimensions]) for device in devices)
    return Torus(topology.shape, topology.wrap, coords)


def node_of(device: jax.Device) -> int:
    """Returns the index of a TPU's slice or a GPU's node: the reach of the fast network."""
    if device.platform == "gpu":
        return device.process_index
    return getattr(device, "slice_index", None) or 0


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Captures what C++ libraries write to standard error; yields a list, filled at the end."""
    sys.stderr.flush()
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        try:
            os.dup2(file.fileno(), 2)
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
