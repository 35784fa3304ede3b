"""Compiler flags for each target: presets, each setting with its reason and source.

On a TPU the preset of its chip is the default (`auto`): without one its collectives are waited for
(those of tpu7x, whose SparseCores run them anyway, are not). On GPUs none is: only `hopper` has
been measured here, on one H200 (benchmarks/README.md), where it is neither faster nor slower than
none: a network it has not. No TPU has run any of this. XLA aborts on a flag that it does not know,
and flags come and go with its versions, so the tests hand each preset to the compilers: those of
JAX 0.10.2, with its libtpu.
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
    """One flag (`--xla_...`) or environment variable, why it is set, and who says so."""

    name: str
    value: str
    reason: str
    source: str

    @property
    def is_flag(self) -> bool:
        """Whether XLA parses it, and would abort on it."""
        return self.name.startswith("--")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of one target.

    Attributes:
      variable: whose flags: LIBTPU_INIT_ARGS of the TPU compiler, XLA_FLAGS of all others.
      settings: in the order in which they are given.
      until: the first libtpu that refuses them, such as (0, 0, 43); None: no known one does.
    """

    variable: str
    settings: tuple[Setting, ...]
    until: tuple[int, ...] | None = None

    def flags(self) -> list[str]:
        """`--name=value` of what XLA parses."""
        return [f"{one.name}={one.value}" for one in self.settings if one.is_flag]

    def refused(self, libtpu: str) -> bool:
        """Whether this version of libtpu refuses it; "" for an unknown one, which is tried."""
        version = tuple(int(part) for part in re.findall(r"\d+", libtpu))
        return self.until is not None and version >= self.until


_GATHER = "weights of the next layer are gathered in pieces between matmuls (fsdp)"
_OVERLAP_GATHER = (
    Setting("--xla_enable_async_all_gather", "true", _GATHER, _MAXTEXT),
    Setting("--xla_tpu_enable_async_collective_fusion", "true", _GATHER, _MAXTEXT),
    Setting("--xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", _GATHER, _MAXTEXT),
    Setting("--xla_tpu_enable_async_collective_fusion_multiple_steps", "true", _GATHER, _MAXTEXT),
    Setting("--xla_tpu_overlap_compute_collective_tc", "true", _GATHER, _MAXTEXT),
)
_REDUCE = "gradients' all-reduces run inside the products of the next weights' gradients"
# Not on v4: such an all-reduce takes all its 16 MiB of VMEM, and code generation fails.
_OVERLAP_REDUCE = (
    Setting("--xla_enable_async_all_reduce", "true", _REDUCE, _MAXTEXT),
    Setting("--xla_tpu_enable_async_collective_fusion_fuse_all_reduce", "true", _REDUCE, _MAXTEXT),
)
_DCN = "gradient all-reduces between slices overlap with the backward pass (dcn.data)"
_OVERLAP_DCN = (
    Setting("--xla_tpu_enable_data_parallel_all_reduce_opt", "true", _DCN, _MAXTEXT),
    Setting("--xla_tpu_data_parallel_opt_different_sized_ops", "true", _DCN, _MAXTEXT),
)
_SCATTER = "a layout in which all-reduce and slice become one reduce-scatter"
_LAYOUT = (
    Setting("--xla_tpu_use_minor_sharding_for_major_trivial_input", "true", _SCATTER, _MAXTEXT),
    Setting("--xla_tpu_relayout_group_size_threshold_for_reduce_scatter", "1", _SCATTER, _MAXTEXT),
    Setting("--xla_tpu_assign_all_reduce_scatter_layout", "true", _SCATTER, _MAXTEXT),
)
_VMEM = Setting(
    "--xla_tpu_scoped_vmem_limit_kib",
    "98304",
    "96 of the 128 MiB of VMEM for the running operation, as dense models are bound by compute",
    _MAXTEXT,
)
_BESIDE = "collectives run on the chip's SparseCores, beside the matrix products"
# Published on tpu7x; on v5p and v6e only compiled. libtpu ignores them on v4.
_SPARSECORE = tuple(
    Setting(f"--xla_tpu_enable_sparse_core_collective_offload_{kind}", "true", _BESIDE, _DEEPSEEK)
    for kind in ("all_gather", "2d_all_gather", "3d_all_gather")
    + ("all_reduce", "reduce_scatter", "nd_reduce_scatter")
)
_IRONWOOD = (
    Setting(
        "--xla_tpu_scoped_vmem_limit_kib",
        "61440",
        "60 of the 64 MiB of VMEM for the running operation, as dense models are bound by compute",
        _IRONWOOD_70B,
    ),
    Setting(
        "--xla_tpu_bf16_emission_mode",
        "NATIVE_EMISSION",
        "bfloat16 arithmetic by the chip's own instructions, not by those of float32",
        _IRONWOOD_70B,
    ),
    Setting(
        "--xla_tpu_enable_sparse_core_collective_offload_all_reduce",
        "true",
        "SparseCores reduce the gradients, beside the backward pass",
        _IRONWOOD_70B,
    ),
    Setting(
        "--xla_tpu_use_single_sparse_core_for_all_gather_offload",
        "true",
        "a gather leaves the other SparseCores to the reductions beside it",
        _IRONWOOD_70B,
    ),
)
_HOST = "copies to and from the host overlap with compute, within the memory that there is"
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
        "collectives start early and end late, so that compute hides them",
        _TOOLBOX,
    ),
    *(
        Setting(f"--xla_gpu_enable_pipelined_{kind}", "true", reason, _TOOLBOX)
        for kind, reason in (
            ("all_gather", "the next layer's weights are gathered during this layer (scan)"),
            ("reduce_scatter", "the last layer's gradients are scattered during this one"),
            ("all_reduce", "the last layer's gradients are reduced during this one"),
        )
    ),
    Setting(
        "--xla_gpu_enable_while_loop_double_buffering",
        "true",
        "two layers' weights are in turn, without a copy, in the scan over layers",
        _TOOLBOX,
    ),
    *(
        Setting(
            f"--xla_gpu_{kind}_combine_threshold_bytes",
            size,
            "one large message instead of many: at least the weights of a layer",
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
            "tensors that are sharded along different dimensions share a message too",
            _RECIPE,
        )
        for kind in ("all_gather", "reduce_scatter")
    ),
    Setting(
        "--xla_disable_hlo_passes",
        "rematerialization",
        "model.remat says what is computed twice; XLA's own pass would add to it",
        _RECIPE,
    ),
    Setting(
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
        "0.9",
        "of the GPU's memory, up from 0.75; the rest is for NCCL and cuDNN",
        _TOOLBOX,
    ),
)
# xla_gpu_graph_level=0, of older recipes, is gone: an empty list of commands is what it meant.
# Nor xla_gpu_enable_triton_gemm=false, which the recipe has: a step takes 11% longer with it.
_HOPPER = (
    Setting("--xla_gpu_enable_command_buffer", "", "CUDA graphs hinder the overlap", _RECIPE),
    Setting(
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        "kernels reach the GPU in the order of the schedule; not on Blackwell",
        _TOOLBOX,
    ),
)
_BLACKWELL = (
    Setting(
        "--xla_gpu_enable_command_buffer",
        "FUSION,CUSTOM_CALL",
        "CUDA graphs of what is not a collective",
        _TOOLBOX,
    ),
)

_V6E_BASE = (_VMEM, *_LAYOUT, *_OVERLAP_DCN)
_V6E = (*_V6E_BASE, *_OVERLAP_GATHER, *_OVERLAP_REDUCE)
# libtpu calls what overlaps here "continuation fusion", and supports it on v5e. On other chips it
# warns of it ("might trigger many errors including .. incorrect results, hang, SDC"), and from
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
# What it takes on each TPU: the first that the installed libtpu does not refuse.
_DEFAULTS = {
    "v4": ("v4",),
    "v5e": ("v5e",),
    "v5p": ("v5p", "v5p-sparsecore"),
    "v6e": ("v6e", "v6e-sparsecore"),
    "tpu7x": ("tpu7x",),
}
NAMES = (*PRESETS, AUTO)
HELP = (
    f"Compiler flags for a target: {', '.join(NAMES)}. {AUTO}: on a TPU the preset of its chip; on "
    "GPUs none, as hopper was neither faster nor slower on an H200. Flags of your own in XLA_FLAGS "
    "and LIBTPU_INIT_ARGS win."
)


@dataclasses.dataclass(frozen=True)
class AppliedPreset:
    """What `use_preset` has set; as text, for people.

    Attributes:
      preset: its name.
      tpu: the chip that `auto` has chosen it for; "" for a GPU or CPU, or a preset given by name.
      new: the number of flags that the environment had not.
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
        """What libtpu itself says of the preset, which later versions refuse."""
        if PRESETS[self.preset].until is None:
            return ""
        other = f"{self.tpu}-sparsecore"
        instead = f", --xla_preset={other} does without" if other in PRESETS else ""
        return f"; libtpu warns of its continuation fusion{instead}"


def flag_value(flag: str, env: Mapping[str, str] = os.environ) -> str | None:
    """The value that XLA_FLAGS give a flag, `true` where it stands alone; the last one counts."""
    parts = [one.partition("=") for one in env.get("XLA_FLAGS", "").split()]
    return {name: value if sign else "true" for name, sign, value in parts}.get(flag)


def is_switched_on(flag: str, env: Mapping[str, str] = os.environ) -> bool:
    """Whether XLA_FLAGS switch a flag on."""
    return flag_value(flag, env) in ("true", "1")


def use_preset(
    name: str,
    env: MutableMapping[str, str] = os.environ,
    tpu: str | None = None,
    libtpu: str | None = None,
) -> AppliedPreset:
    """Sets a preset in the environment; call it before JAX starts a backend.

    What the environment says already, wins: flags of the same name, and variables.

    Args:
      name: of the preset, or `auto`.
      env: the environment.
      tpu: the chip that `auto` is of; "" for no TPU; None for what is here.
      libtpu: the version that compiles; "" for an unknown one; None for what is installed.

    Returns:
      What is set.

    Raises:
      UserError: there is no such preset, or this libtpu refuses it.
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
            f"fusion on v5e alone; --xla_preset={AUTO} takes what it supports"
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
