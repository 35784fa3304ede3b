"""Presets of compiler flags for each target; each setting has a reason and a source.

On a TPU the preset of its chip is the default (`auto`): without it, compute waits for collectives
(except on tpu7x, whose SparseCores run them anyway). On GPUs the default has no flags: only
`hopper` has been measured here, on one H200 without a network (benchmarks/README.md), where it was
neither faster nor slower. No TPU has run any of these presets. XLA aborts on a flag that it does
not know, and flags come and go with its versions, so the tests pass each preset to the compilers
of JAX 0.10.2 and its libtpu.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, MutableMapping

from llama_jax.errors import UserError
from llama_jax.hardware.local_tpu import libtpu_version, tpu_here

_MAXTEXT = "MaxText benchmarks/xla_flags_library.py"
_IRONWOOD_70B = "AI-Hypercomputer tpu-recipes training/ironwood, Llama 3.1 70B, bfloat16, 4x4x4"
_DEEPSEEK = "AI-Hypercomputer tpu-recipes training/ironwood, DeepSeek 3 671B, bfloat16, 4x4x8"
_RECIPE = "AI-Hypercomputer gpu-recipes, Llama 3.1 70B on H200 (a3ultra)"
_TOOLBOX = "JAX-Toolbox docs/GPU_performance.md"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A flag (`--xla_...`) or environment variable, with the reason for it and its source."""

    name: str
    value: str
    reason: str
    source: str

    @property
    def is_flag(self) -> bool:
        """Says whether XLA parses the setting, and aborts if it does not know it."""
        return self.name.startswith("--")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of one target.

    Attributes:
      variable: the environment variable for the flags: LIBTPU_INIT_ARGS for the TPU compiler,
        XLA_FLAGS for all others.
      settings: the settings, in the order in which they are passed.
      until: the first libtpu that refuses them, such as (0, 0, 43); None: no known version does.
    """

    variable: str
    settings: tuple[Setting, ...]
    until: tuple[int, ...] | None = None

    def flags(self) -> list[str]:
        """Returns the settings that XLA parses, as `--name=value`."""
        return [f"{one.name}={one.value}" for one in self.settings if one.is_flag]

    def refused(self, libtpu: str) -> bool:
        """Returns whether a libtpu refuses the preset; False for "", an unknown version."""
        version = tuple(int(part) for part in re.findall(r"\d+", libtpu))
        return self.until is not None and version >= self.until


_GATHER = "gather the next layer's weights in pieces between matmuls (fsdp)"
_OVERLAP_GATHER = (
    Setting("--xla_enable_async_all_gather", "true", _GATHER, _MAXTEXT),
    Setting("--xla_tpu_enable_async_collective_fusion", "true", _GATHER, _MAXTEXT),
    Setting("--xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", _GATHER, _MAXTEXT),
    Setting("--xla_tpu_enable_async_collective_fusion_multiple_steps", "true", _GATHER, _MAXTEXT),
    Setting("--xla_tpu_overlap_compute_collective_tc", "true", _GATHER, _MAXTEXT),
)
_REDUCE = "run the all-reduces of gradients inside the products of the next gradients"
# Not for v4: such an all-reduce takes all of its 16 MiB of VMEM, and code generation fails.
_OVERLAP_REDUCE = (
    Setting("--xla_enable_async_all_reduce", "true", _REDUCE, _MAXTEXT),
    Setting("--xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true", _REDUCE, _MAXTEXT),
)
_DCN = "overlap gradient all-reduces between slices with the backward pass (dcn.data)"
_OVERLAP_DCN = (
    Setting("--xla_tpu_enable_data_parallel_all_reduce_opt", "true", _DCN, _MAXTEXT),
    Setting("--xla_tpu_data_parallel_opt_different_sized_ops", "true", _DCN, _MAXTEXT),
)
_SCATTER = "choose a layout in which all-reduce and slice become one reduce-scatter"
_LAYOUT = (
    Setting("--xla_tpu_use_minor_sharding_for_major_trivial_input", "true", _SCATTER, _MAXTEXT),
    Setting("--xla_tpu_relayout_group_size_threshold_for_reduce_scatter", "1", _SCATTER, _MAXTEXT),
    Setting("--xla_tpu_assign_all_reduce_scatter_layout", "true", _SCATTER, _MAXTEXT),
)
_VMEM = Setting(
    "--xla_tpu_scoped_vmem_limit_kib",
    "98304",
    "give 96 of the 128 MiB of VMEM to the running operation: dense models are compute-bound",
    _MAXTEXT,
)
_BESIDE = "run collectives on the chip's SparseCores, in parallel with the matrix products"
# Published for tpu7x; only compiled for v5p and v6e. libtpu ignores them on v4.
_SPARSECORE = tuple(
    Setting(f"--xla_tpu_enable_sparse_core_collective_offload_{kind}", "true", _BESIDE, _DEEPSEEK)
    for kind in ("all_gather", "2d_all_gather", "3d_all_gather")
    + ("all_reduce", "reduce_scatter", "nd_reduce_scatter")
)
_IRONWOOD = (
    Setting(
        "--xla_tpu_scoped_vmem_limit_kib",
        "61440",
        "give 60 of the 64 MiB of VMEM to the running operation: dense models are compute-bound",
        _IRONWOOD_70B,
    ),
    Setting(
        "--xla_tpu_bf16_emission_mode",
        "NATIVE_EMISSION",
        "use the chip's bfloat16 instructions instead of the float32 ones",
        _IRONWOOD_70B,
    ),
    Setting(
        "--xla_tpu_enable_sparse_core_collective_offload_all_reduce",
        "true",
        "let SparseCores reduce the gradients, in parallel with the backward pass",
        _IRONWOOD_70B,
    ),
    Setting(
        "--xla_tpu_use_single_sparse_core_for_all_gather_offload",
        "true",
        "gather on one SparseCore, and leave the others to the reductions at the same time",
        _IRONWOOD_70B,
    ),
)
_HOST = "overlap copies to and from the host with compute, within the available memory"
_HOST_OFFLOAD = tuple(
    Setting(name, value, _HOST, _MAXTEXT)
    for name, value in (
        ("--xla_tpu_enable_all_experimental_scheduler_features", "true"),
        ("--xla_tpu_enable_scheduler_memory_pressure_tracking", "true"),
        ("--xla_tpu_host_transfer_overlap_limit", "24"),
        ("--xla_tpu_aggressive_opt_barrier_removal", "ENABLED"),
        ("--xla_lhs_prioritize_async_depth_over_stall", "ENABLED"),
        ("--xla_tpu_enable_ag_backward_pipelining", "true"),
        ("--xla_should_allow_loop_variant_parameter_in_chain", "ENABLED"),
        ("--xla_should_add_loop_invariant_op_in_chain", "ENABLED"),
        ("--xla_max_concurrent_host_send_recv", "100"),
        ("--xla_tpu_scheduler_percent_shared_memory_limit", "100"),
        ("--xla_latency_hiding_scheduler_rerun", "2"),
    )
)

_OVERLAP_GPU = (
    Setting(
        "--xla_gpu_enable_latency_hiding_scheduler",
        "true",
        "start collectives early and end them late, so that compute hides them",
        _TOOLBOX,
    ),
    *(
        Setting(f"--xla_gpu_enable_pipelined_{kind}", "true", reason, _TOOLBOX)
        for kind, reason in (
            ("all_gather", "gather the next layer's weights during this layer (scan)"),
            ("reduce_scatter", "scatter the previous layer's gradients during this layer"),
            ("all_reduce", "reduce the previous layer's gradients during this layer"),
        )
    ),
    Setting(
        "--xla_gpu_enable_while_loop_double_buffering",
        "true",
        "alternate between two buffers of layer weights in the scan, without a copy",
        _TOOLBOX,
    ),
    *(
        Setting(
            f"--xla_gpu_{kind}_combine_threshold_bytes",
            size,
            "send one large message instead of many: at least the weights of a layer",
            _RECIPE,
        )
        for kind, size in (
            ("all_reduce", "2147483648"),
            ("all_gather", "2147483648"),
            ("reduce_scatter", "16777216"),
        )
    ),
    *(
        Setting(
            f"--xla_gpu_enable_{kind}_combine_by_dim",
            "false",
            "let tensors that are sharded along different dimensions share a message",
            _RECIPE,
        )
        for kind in ("all_gather", "reduce_scatter")
    ),
    Setting(
        "--xla_disable_hlo_passes",
        "rematerialization",
        "model.remat decides what is recomputed; XLA's own pass would add to that",
        _RECIPE,
    ),
    Setting(
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "0.9",
        "use 0.9 of the GPU's memory instead of 0.75; the rest is for NCCL and cuDNN",
        _TOOLBOX,
    ),
)
# Left out: xla_gpu_graph_level=0 of older recipes, which XLA has removed (an empty list of commands
# means the same), and xla_gpu_enable_triton_gemm=false of the recipe: a step takes 11% longer.
_HOPPER = (
    Setting("--xla_gpu_enable_command_buffer", "", "no CUDA graphs: they hinder overlap", _RECIPE),
    Setting(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "kernels reach the GPU in the order of the schedule; not for Blackwell",
        _TOOLBOX,
    ),
)
_BLACKWELL = (
    Setting(
        "--xla_gpu_enable_command_buffer",
        "FUSION,CUSTOM_CALL",
        "CUDA graphs for everything but collectives",
        _TOOLBOX,
    ),
)

_V6E_BASE = (_VMEM, *_LAYOUT, *_OVERLAP_DCN)
_V6E = (*_V6E_BASE, *_OVERLAP_GATHER, *_OVERLAP_REDUCE)
# libtpu calls this kind of overlap "continuation fusion", and supports it only on v5e. On other
# chips it warns ("might trigger many errors including .. incorrect results, hang, SDC"), and from
# 0.0.43 on (JAX 0.10.2 has 0.0.42, JAX 0.12 has 0.0.50) it refuses to compile.
_FUSION_ENDS = (0, 0, 43)
PRESETS = {
    "none": Preset("XLA_FLAGS", ()),  # CPUs
    "v4": Preset("LIBTPU_INIT_ARGS", _OVERLAP_GATHER, _FUSION_ENDS),
    "v5e": Preset("LIBTPU_INIT_ARGS", _OVERLAP_DCN + _OVERLAP_GATHER + _OVERLAP_REDUCE),
    "v5p": Preset(
        "LIBTPU_INIT_ARGS", _OVERLAP_DCN + _OVERLAP_GATHER + _OVERLAP_REDUCE, _FUSION_ENDS
    ),
    "v6e": Preset("LIBTPU_INIT_ARGS", _V6E, _FUSION_ENDS),
    "v6e-offload": Preset("LIBTPU_INIT_ARGS", _V6E + _HOST_OFFLOAD, _FUSION_ENDS),
    "v5p-sparsecore": Preset("LIBTPU_INIT_ARGS", _OVERLAP_DCN + _SPARSECORE),
    "v6e-sparsecore": Preset("LIBTPU_INIT_ARGS", _V6E_BASE + _SPARSECORE),
    "tpu7x": Preset("LIBTPU_INIT_ARGS", _IRONWOOD),
    "ampere": Preset("XLA_FLAGS", _OVERLAP_GPU),
    "hopper": Preset("XLA_FLAGS", _OVERLAP_GPU + _HOPPER),
    "blackwell": Preset("XLA_FLAGS", _OVERLAP_GPU + _BLACKWELL),
}

AUTO = "auto"
# The presets for `auto` on each TPU: the first one that the installed libtpu does not refuse.
_DEFAULTS = {
    "v4": ("v4",),
    "v5e": ("v5e",),
    "v5p": ("v5p", "v5p-sparsecore"),
    "v6e": ("v6e", "v6e-sparsecore"),
    "tpu7x": ("tpu7x",),
}
NAMES = (*PRESETS, AUTO)
HELP = (
    f"Preset of compiler flags: {', '.join(NAMES)}. {AUTO}: on a TPU the preset of its chip, on "
    "GPUs none (hopper was neither faster nor slower on an H200). Your own flags in XLA_FLAGS and "
    "LIBTPU_INIT_ARGS override the preset."
)


@dataclasses.dataclass(frozen=True)
class AppliedPreset:
    """The preset that `use_preset` has set; `str` describes it for the log.

    Attributes:
      preset: name of the preset.
      tpu: the chip for which `auto` chose it; "" for a GPU or CPU, or a preset given by name.
      new: the number of flags that the environment did not set before.
    """

    preset: str
    tpu: str
    new: int

    def __str__(self) -> str:
        if not PRESETS[self.preset].settings:
            return f"none, as this libtpu takes no preset for {self.tpu}" if self.tpu else "none"
        total = len(PRESETS[self.preset].flags())
        count = f"{self.new} flags"
        if self.new < total:
            count = f"{self.new} of {total} flags, the environment sets the others"
        off = "; --xla_preset=none turns it off" if self.tpu else ""
        return f"preset {self.preset} ({count}{off}{self._warning()})"

    def _warning(self) -> str:
        """Returns libtpu's own warning about a preset that later versions refuse; else empty."""
        if PRESETS[self.preset].until is None:
            return ""
        other = f"{self.tpu}-sparsecore"
        instead = f", --xla_preset={other} does not use it" if other in PRESETS else ""
        return f"; libtpu warns of its continuation fusion{instead}"


def flag_value(flag: str, env: Mapping[str, str] = os.environ) -> str | None:
    """Returns a flag's last value in XLA_FLAGS, `true` if it has none; None if it is absent."""
    parts = [one.partition("=") for one in env.get("XLA_FLAGS", "").split()]
    return {name: value if sign else "true" for name, sign, value in parts}.get(flag)


def is_switched_on(flag: str, env: Mapping[str, str] = os.environ) -> bool:
    """Returns whether XLA_FLAGS switch a flag on."""
    return flag_value(flag, env) in ("true", "1")


def use_preset(
    name: str,
    env: MutableMapping[str, str] = os.environ,
    tpu: str | None = None,
    libtpu: str | None = None,
) -> AppliedPreset:
    """Sets a preset in the environment; call it before JAX starts a backend.

    Flags and variables that the environment already sets are kept.

    Args:
      name: name of the preset, or `auto`.
      env: the environment variables, which are changed.
      tpu: the chip for `auto`; "" for no TPU; None for that of this computer.
      libtpu: version of the compiler; "" if unknown; None for the installed one.

    Raises:
      UserError: the preset does not exist, or this libtpu refuses it.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, 1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"no XLA preset {name!r} among {', '.join(NAMES)}{hint}")
    libtpu = libtpu_version() if libtpu is None else libtpu
    chip = ""
    if name == AUTO:
        chip = tpu_here(env) if tpu is None else tpu
        taken = [one for one in _DEFAULTS.get(chip, ()) if not PRESETS[one].refused(libtpu)]
        name = taken[0] if taken else "none"
    elif PRESETS[name].refused(libtpu):
        raise UserError(
            f"libtpu {libtpu} refuses the flags of --xla_preset={name}: it supports continuation "
            f"fusion on v5e alone; --xla_preset={AUTO} takes a preset that it supports"
        )
    preset = PRESETS[name]
    users = env.get(preset.variable, "").split()
    named = {flag.split("=")[0] for flag in users}
    ours = [flag for flag in preset.flags() if flag.split("=")[0] not in named]
    if ours:
        env[preset.variable] = " ".join([*ours, *users])
    for one in preset.settings:
        if not one.is_flag:
            env.setdefault(one.name, one.value)
    return AppliedPreset(name, chip, len(ours))
