"""Accelerators: peaks and sizes, with their sources. The one table that MFU and `plan` use.

NVIDIA figures are of the data sheets (dense bfloat16, no sparsity; SXM modules), TPU figures of
Google Cloud's pages on system architecture and of Jouppi et al. 2023 (arXiv:2304.01433) for v4.
Links are in one direction, all links of a chip together.
"""

import dataclasses

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as its maker specifies it.

    Attributes:
      name: short, as in a topology.
      kind: part of JAX's `device_kind` that names it.
      peak_flops: dense bfloat16 FLOP/s.
      hbm_bytes: memory that programs can use, bytes.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of the fast network (ICI, NVLink), one direction.
      clock: Hz of the unit that the compiler counts cycles of; None if not published.
      cores_per_chip: TensorCores by which Google Cloud counts a slice's name; 1: it counts chips.
      torus: dimensions of the ICI network; 0 for GPUs.
    """

    name: str
    kind: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    clock: float | None = None
    cores_per_chip: int = 1
    torus: int = 0


CHIPS = (
    Chip("v4", "TPU v4", 275e12, 32 * GIB, 1228 * GB, 150 * GB, 1.05e9, 2, 3),
    Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, 819 * GB, 100 * GB, 1.5e9, 1, 2),
    Chip("v5p", "TPU v5", 459e12, 95 * GIB, 2765 * GB, 300 * GB, 1.75e9, 2, 3),
    Chip("v6e", "TPU v6 lite", 918e12, 32 * GIB, 1640 * GB, 224 * GB, None, 1, 2),
    Chip("a100-80g", "A100", 312e12, 80 * GIB, 2039 * GB, 300 * GB),
    # The SXM module; PCIe and NVL cards have other peaks.
    Chip("h100", "H100 80GB HBM3", 989e12, 80 * GIB, 3350 * GB, 450 * GB),
    Chip("h200", "H200", 989e12, 141 * GB, 4800 * GB, 450 * GB),
    Chip("b200", "B200", 2250e12, 180 * GB, 8000 * GB, 900 * GB),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None for CPUs and what is not in the table."""
    return next((chip for chip in CHIPS if chip.kind in device_kind), None)


def chip_named(name: str) -> Chip | None:
    """The chip of a topology's name, such as `v5p`."""
    return next((chip for chip in CHIPS if chip.name == name), None)
