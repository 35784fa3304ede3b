"""Accelerators: peaks and sizes, with their sources. The one table that MFU and `plan` use.

TPU figures are of Google Cloud's pages on each version (docs.cloud.google.com/tpu/docs/v5p and the
like), and of Jouppi et al. 2023 (arXiv:2304.01433) for v4; NVIDIA figures of the data sheets
(dense, no sparsity; SXM modules). Links are in one direction, all links of a device together: half
of the bidirectional bandwidth per chip on Google's pages (v5e 400, v5p 1,200, v6e 800, tpu7x 1,200
GB/s), and six links of 50 GB/s for v4. Networks between nodes are those of NVIDIA's DGX and HGX
systems, a 200 (A100), 400 (H100, H200, B200) Gbit/s InfiniBand card per GPU; between TPU slices,
the data-centre network of a host of four chips (eight: v5e, v6e) as in "How to Scale Your Model"
(jax-ml.github.io/scaling-book).

The clock of v4 is published (arXiv:2304.01433). The others follow from the peak and the matrix
units: eight (v5e: four) of 128 x 128 multipliers, and on v6e and tpu7x two of 256 x 256 that start
two products a cycle, 524,288 FLOP. The compiler's own estimates come to 0.92 of that on v6e for the
best products.
"""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """What XLA's compiler asks about a GPU that is not here (its GpuTargetConfigProto).

    From XLA's xla/backends/gpu/target_config/specs and NVIDIA's tuning guides.

    Attributes:
      capability: CUDA compute capability, major and minor.
      accelerated: whether instructions of just this architecture (`sm_90a`) are there.
      cores: streaming multiprocessors.
      fpus: float32 units per core.
      shared_per_core: bytes of shared memory per core.
      shared_per_block: bytes of it that one block may take.
      l2: bytes of second-level cache.
      clock_ghz: boost clock.
      memory: bytes.
      links: NVLinks in use.
    """

    capability: tuple[int, int]
    accelerated: bool
    cores: int
    fpus: int
    shared_per_core: int
    shared_per_block: int
    l2: int
    clock_ghz: float
    memory: int
    links: int


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as its maker specifies it.

    Attributes:
      name: short, as in a topology.
      kind: part of JAX's `device_kind` that names it.
      peak_flops: dense bfloat16 FLOP/s, of one JAX device.
      int8: operations/s of 8-bit integers, as a multiple of `peak_flops`; 1: as fast, or not
        published.
      fp8: FLOP/s of 8-bit floats, likewise; 1 where they are multiplied as bfloat16.
      hbm_bytes: memory that programs can use, bytes: on TPUs what the compiler itself allows; on
        GPUs 0.9 of what the driver shows, for NCCL, cuDNN and the driver take the rest
        (XLA_PYTHON_CLIENT_MEM_FRACTION=0.9).
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of the fast network (ICI, NVLink), one direction, all links.
      network_bandwidth: bytes/s of the network between slices or nodes, per device, one direction.
      clock: Hz of the unit that the compiler counts cycles of; None if not published.
      cores_per_chip: TensorCores by which Google Cloud counts a slice's name; 1: it counts chips.
      torus: dimensions of the ICI network; 0 for GPUs.
      devices_per_chip: JAX devices that one chip is; all figures here are of one device.
      matmul_efficiency: of the peak that large matrix products reach; on Hopper those of our own
        step, measured on an H200 (benchmarks/README.md), which has the H100's unit; for other GPUs
        as measured by Bekman, ML Engineering (github.com/stas00/ml-engineering, "Maximum Achievable
        Matmul FLOPS"; it gives Hopper 0.803), for TPUs 1, as the compiler's cycles have it in.
      attention_efficiency: of the peak that attention kernels reach, forward and backward
        together at heads of 128 and T 2048, causal: on Hopper cuDNN's, measured in the same step;
        on A100 FlashAttention-2's (arXiv:2307.08691, figures 4 to 6); elsewhere an assumption, for
        v6e and tpu7x half of the others', as a head of 128 fills half of a unit of 256.
      target: of GPUs, what the compiler asks.
    """

    name: str
    kind: str
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    clock: float | None = None
    cores_per_chip: int = 1
    torus: int = 0
    devices_per_chip: int = 1
    matmul_efficiency: float = 1.0
    attention_efficiency: float = 0.5
    int8: float = 1.0
    fp8: float = 1.0
    target: GpuTarget | None = None

    def peak_of(self, *dtypes: str) -> float:
        """FLOP/s of products of operands of these types, named as in HLO; of 8-bit ones all are."""
        if dtypes and all(dtype in ("s8", "u8", "s4", "u4") for dtype in dtypes):
            return self.int8 * self.peak_flops
        if dtypes and all(dtype.startswith("f8") for dtype in dtypes):
            return self.fp8 * self.peak_flops
        return self.peak_flops


def _gpu(
    name: str,
    kind: str,
    peak: float,
    bandwidth: float,
    link: float,
    network: float,
    efficiencies: tuple[float, float],
    target: GpuTarget,
    fp8: float = 2.0,
) -> Chip:
    return Chip(
        name,
        kind,
        peak,
        0.9 * target.memory,
        bandwidth,
        link,
        network,
        matmul_efficiency=efficiencies[0],
        attention_efficiency=efficiencies[1],
        int8=2.0,
        fp8=fp8,
        target=target,
    )


_A100 = GpuTarget((8, 0), False, 108, 64, 167936, 166912, 41943040, 1.41, 85100068864, 12)
_H100 = GpuTarget((9, 0), True, 132, 128, 233472, 232448, 52428800, 1.98, 84942979072, 18)
_H200 = dataclasses.replace(_H100, memory=151397597184)
_RTX4090 = GpuTarget((8, 9), False, 128, 128, 102400, 101376, 75497472, 2.52, 25757220864, 0)
_L40S = GpuTarget((8, 9), False, 142, 128, 102400, 101376, 50331648, 2.52, 48305799168, 0)
_B200 = GpuTarget((10, 0), True, 148, 128, 233472, 232448, 132644864, 1.965, 191514411008, 18)

CHIPS = (
    Chip("v4", "TPU v4", 275e12, 30.75 * GIB, 1228 * GB, 300 * GB, 6.25 * GB, 1.05e9, 2, 3),
    Chip(
        *("v5e", "TPU v5 lite", 197e12, 15.75 * GIB, 819 * GB, 200 * GB, 3.125 * GB, 1.5e9, 1, 2),
        int8=2.0,
    ),
    Chip(
        *("v5p", "TPU v5", 459e12, 95.74 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, 1.75e9, 2, 3),
        int8=2.0,
    ),
    Chip(
        *("v6e", "TPU v6 lite", 918e12, 31.25 * GIB, 1640 * GB, 400 * GB, 12.5 * GB, 1.75e9, 1, 2),
        int8=2.0,
        attention_efficiency=0.25,
    ),
    # Two devices: a chip has 2307 TFLOP/s, 192 GiB, 7,380 GB/s and 1.2 TB/s of links both ways.
    Chip(
        *("tpu7x", "TPU7x", 1153.5e12, 94.75 * GIB, 3690 * GB, 300 * GB, 12.5 * GB, 2.2e9, 2, 3, 2),
        fp8=2.0,
        attention_efficiency=0.25,
    ),
    _gpu("a100-80g", "A100", 312e12, 2039 * GB, 300 * GB, 25 * GB, (0.869, 0.55), _A100, 1.0),
    # The SXM module; PCIe and NVL cards have other peaks.
    _gpu("h100", "H100 80GB HBM3", 989e12, 3350 * GB, 450 * GB, 50 * GB, (0.71, 0.385), _H100),
    _gpu("h200", "H200", 989e12, 4800 * GB, 450 * GB, 50 * GB, (0.71, 0.385), _H200),
    # Over PCIe 4; the data sheet's peak of the 4090 is with float32 sums.
    _gpu("rtx4090", "RTX 4090", 165.2e12, 1008 * GB, 32 * GB, 12.5 * GB, (0.8, 0.5), _RTX4090),
    _gpu("l40s", "L40S", 362e12, 864 * GB, 32 * GB, 12.5 * GB, (0.8, 0.5), _L40S),
    _gpu("b200", "B200", 2250e12, 8000 * GB, 900 * GB, 50 * GB, (0.776, 0.40), _B200),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None for CPUs and what is not in the table."""
    return next((chip for chip in CHIPS if chip.kind in device_kind), None)


def chip_named(name: str) -> Chip | None:
    """The chip of a topology's name, such as `v5p`."""
    return next((chip for chip in CHIPS if chip.name == name), None)


def peak_flops(device: "jax.Device") -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None where it is not known (CPUs, new chips)."""
    chip = find_chip(device.device_kind)
    return None if chip is None else chip.peak_flops


def peak_name(device: "jax.Device") -> str:
    """What MFU is a share of, such as `NVIDIA H200 989 TFLOP/s`."""
    peak = peak_flops(device)
    return device.device_kind + (f" {peak / 1e12:,.0f} TFLOP/s" if peak else "")
