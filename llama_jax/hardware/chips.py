"""Peaks and sizes of accelerators, with their sources: the one table that MFU and `plan` use.

TPU figures come from Google Cloud's pages on each version (docs.cloud.google.com/tpu/docs/v5p and
the like), and for v4 from Jouppi et al. 2023 (arXiv:2304.01433); NVIDIA figures come from the data
sheets (dense, no sparsity; SXM modules). Link bandwidths are one direction of all links of a device
together: half of the bidirectional bandwidth per chip on Google's pages (v5e 400, v5p 1,200, v6e
800, tpu7x 1,200 GB/s), and six links of 50 GB/s for v4. Networks between nodes are those of
NVIDIA's DGX and HGX systems, with one InfiniBand card of 200 (A100) or 400 (H100, H200, B200)
Gbit/s per GPU; between TPU slices, the data-centre network of a host of four chips (eight: v5e,
v6e) as in "How to Scale Your Model" (jax-ml.github.io/scaling-book).

The clock of v4 is published (arXiv:2304.01433). The others follow from the peak and the matrix
units: eight (v5e: four) of 128 x 128 multipliers; on v6e and tpu7x two of 256 x 256, which start
two products a cycle (524,288 FLOP). The compiler's own estimates reach 0.92 of that on v6e for the
largest products.
"""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """The properties of a GPU that XLA's compiler needs (its GpuTargetConfigProto).

    The figures come from XLA's xla/backends/gpu/target_config/specs and NVIDIA's tuning guides.

    Attributes:
      capability: CUDA compute capability, major and minor.
      accelerated: whether architecture-specific instructions (`sm_90a`) exist.
      cores: streaming multiprocessors.
      fpus: float32 units per core.
      shared_per_core: bytes of shared memory per core.
      shared_per_block: bytes of shared memory that one block may use.
      l2: bytes of second-level cache.
      clock_ghz: boost clock in GHz.
      memory: bytes of device memory.
      links: number of active NVLinks.
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
      name: short name, as in a topology.
      kind: the part of JAX's `device_kind` that identifies the chip.
      peak_flops: dense bfloat16 FLOP/s of one JAX device.
      hbm_bytes: bytes of memory that programs can use: on TPUs what the compiler itself allows; on
        GPUs 0.9 of what the driver shows, because NCCL, cuDNN and the driver take the rest
        (XLA_PYTHON_CLIENT_MEM_FRACTION=0.9).
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of the fast network (ICI, NVLink), one direction, all links.
      network_bandwidth: bytes/s of the network between slices or nodes, per device, one direction.
      clock: Hz of the unit whose cycles the compiler counts; None if not published.
      cores_per_chip: TensorCores per chip, if Google Cloud counts them in the names of slices; 1 if
        it counts chips.
      torus: number of dimensions of the ICI network; 0 for GPUs.
      devices_per_chip: JAX devices per chip; all figures here are for one device.
      matmul_efficiency: fraction of the peak that large matrix products reach. On Hopper measured
        in our own step on an H200 (benchmarks/README.md), which has the same matrix unit as the
        H100; for other GPUs measured by Bekman, ML Engineering (github.com/stas00/ml-engineering,
        "Maximum Achievable Matmul FLOPS"; it gives Hopper 0.803); 1 for TPUs, because the
        compiler's cycles include it.
      attention_efficiency: fraction of the peak that attention kernels reach, forward and backward
        together, with heads of 128 and T 2048, causal. For Hopper it is that of cuDNN, measured in
        the same step; for A100 that of FlashAttention-2 (arXiv:2307.08691, figures 4 to 6). For
        other chips it is assumed; v6e and tpu7x have half the value of other TPUs, because a head
        of 128 fills half of a unit of 256.
      int8: operations/s of 8-bit integers, as a multiple of `peak_flops`; 1: equally fast, or not
        published.
      fp8: FLOP/s of 8-bit floats, likewise; 1 if they are multiplied as bfloat16.
      target: properties of a GPU for the compiler; None for TPUs.
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
        """Returns the FLOP/s of products of these HLO types; 8-bit speed needs all to be 8-bit."""
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
    # Half of a chip, which has 2307 TFLOP/s, 192 GiB, 7,380 GB/s and 1.2 TB/s of links both ways.
    Chip(
        *("tpu7x", "TPU7x", 1153.5e12, 94.75 * GIB, 3690 * GB, 300 * GB, 12.5 * GB, 2.2e9, 2, 3, 2),
        fp8=2.0,
        attention_efficiency=0.25,
    ),
    _gpu("a100-80g", "A100", 312e12, 2039 * GB, 300 * GB, 25 * GB, (0.869, 0.55), _A100, 1.0),
    # The SXM module; PCIe and NVL cards have other peaks.
    _gpu("h100", "H100 80GB HBM3", 989e12, 3350 * GB, 450 * GB, 50 * GB, (0.71, 0.385), _H100),
    _gpu("h200", "H200", 989e12, 4800 * GB, 450 * GB, 50 * GB, (0.71, 0.385), _H200),
    # Links over PCIe 4; the peak of the 4090 is that with float32 sums in its data sheet.
    _gpu("rtx4090", "RTX 4090", 165.2e12, 1008 * GB, 32 * GB, 12.5 * GB, (0.8, 0.5), _RTX4090),
    _gpu("l40s", "L40S", 362e12, 864 * GB, 32 * GB, 12.5 * GB, (0.8, 0.5), _L40S),
    _gpu("b200", "B200", 2250e12, 8000 * GB, 900 * GB, 50 * GB, (0.776, 0.40), _B200),
)


def find_chip(device_kind: str) -> Chip | None:
    """Finds the chip of a JAX `device_kind`; None for CPUs and chips that the table lacks."""
    return next((chip for chip in CHIPS if chip.kind in device_kind), None)


def chip_named(name: str) -> Chip | None:
    """Finds a chip by its name in a topology, such as `v5p`; None if there is none."""
    return next((chip for chip in CHIPS if chip.name == name), None)


def peak_flops(device: "jax.Device") -> float | None:
    """Returns the peak bfloat16 FLOP/s of a device; None if unknown (CPUs, new chips)."""
    chip = find_chip(device.device_kind)
    return None if chip is None else chip.peak_flops


def peak_name(device: "jax.Device") -> str:
    """Names the peak that MFU is a fraction of, such as `NVIDIA H200 989 TFLOP/s`."""
    peak = peak_flops(device)
    return device.device_kind + (f" {peak / 1e12:,.0f} TFLOP/s" if peak else "")
