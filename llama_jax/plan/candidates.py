"""The configs that a machine could run: mesh shapes, remat policies, microbatches."""

import dataclasses
import math
from collections.abc import Iterator

from llama_jax.config import NF4_BLOCK, Config
from llama_jax.hardware.topology import Topology
from llama_jax.parallel.mesh import mesh_shape
from llama_jax.parallel.sharding import devices_along, weight_shards
from llama_jax.plan.compilation import with_slices

TENSOR_SIZES = (1, 2, 4, 8)
MOST_MICROBATCHES = 64  # per candidate
# Tensors to save, from the fewest bytes to the most. Each saved byte of a product's result saves
# about the same FLOPs; a byte of attention's result saves less as long as the sequence length is
# less than `model.dim`. `mlp_gate` and `mlp_up` are the largest tensors.
_SETS = (
    ("attn_out",),
    ("attn_out", "q"),
    ("mlp_up",),
    ("mlp_up", "attn_out"),
    ("mlp_up", "attn_out", "q"),
    ("mlp_gate", "mlp_up"),
    ("mlp_gate", "mlp_up", "attn_out"),
    ("mlp_gate", "mlp_up", "attn_out", "q"),
    ("q", "k", "v", "attn_context", "mlp_gate", "mlp_up"),
    ("mlp_gate", "mlp_up", "attn_out", "q", "k", "v"),
    ("mlp_gate", "mlp_up", "attn_out", "q", "k", "v", "attn_context"),
)


def with_dcn(config: Config, topology: Topology) -> Config:
    """Returns the config with all sizes of `dcn` filled in.

    Raises:
      UserError: `dcn` has another number of slices.
    """
    config = with_slices(config, topology.slices)
    if -1 not in dataclasses.asdict(config.dcn).values():
        return config
    sizes = mesh_shape(config.dcn, topology.slices)
    return dataclasses.replace(config, dcn=dataclasses.replace(config.dcn, **sizes))


def remat_policies() -> list[str]:
    """Lists remat policies, from the one that keeps least to the one that keeps most."""
    return ["full", *(f"save:{','.join(names)}" for names in _SETS), "none"]


def with_options(config: Config, sizes: dict[str, int], remat: str, accum: int) -> Config:
    """Returns the config with another mesh, remat policy and number of microbatches.

    Args:
      config: the config.
      sizes: devices along each mesh axis, within one slice.
      remat: the remat policy.
      accum: the number of microbatches.
    """
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **sizes),
        model=dataclasses.replace(config.model, remat=remat),
        train=dataclasses.replace(config.train, grad_accum=accum),
    )


def divides(config: Config, sizes: dict[str, int], accum: int, outer: int) -> bool:
    """Returns whether batch and model divide over a mesh.

    Args:
      config: the config.
      sizes: devices along each mesh axis, within one slice.
      accum: the number of microbatches.
      outer: the number of slices along `data`.
    """
    model, train = config.model, config.train
    rows, tensor = devices_along("batch", sizes) * outer, devices_along("heads", sizes)
    split = [model.n_kv_heads, model.n_heads, model.ffn_dim, model.vocab_size]
    block = NF4_BLOCK if config.lora.rank and config.lora.base_dtype == "nf4" else 1
    if block > 1:
        split += [model.ffn_dim // block, model.n_heads * model.head_dim // block]
    return (
        train.global_batch % (accum * rows) == 0
        and model.dim // block % weight_shards(sizes) == 0
        and all(size % tensor == 0 for size in split)
    )


def microbatch_counts(config: Config) -> list[int]:
    """Lists the numbers of microbatches that divide the global batch, from 1 on."""
    batch = config.train.global_batch
    return [size for size in range(1, batch + 1) if batch % size == 0]


def candidates(config: Config, topology: Topology) -> Iterator[Config]:
    """Yields the configs that divide over the machine, in no particular order."""
    outer = math.prod(dataclasses.asdict(config.dcn).values())
    inner = topology.devices // outer
    context = config.mesh.context if config.mesh.context > 0 else 1
    accums = [size for size in microbatch_counts(config) if size <= MOST_MICROBATCHES]
    for tensor in TENSOR_SIZES:
        rest, left = divmod(inner, tensor * context)
        for fsdp in (size for size in range(1, rest + 1) if not left and rest % size == 0):
            sizes = {"data": rest // fsdp, "fsdp": fsdp, "context": context, "tensor": tensor}
            for accum in accums:
                if not divides(config, sizes, accum, config.dcn.data):
                    continue
                for remat in remat_policies():
                    yield with_options(config, sizes, remat, accum)


def flags_for(config: Config, remat: bool = True) -> str:
    """Returns the flags that turn the config file into a candidate."""
    mesh = " ".join(
        f"--config.mesh.{axis}={size}" for axis, size in dataclasses.asdict(config.mesh).items()
    )
    policy = f" --config.model.remat={config.model.remat}" if remat else ""
    return f"{mesh}{policy} --config.train.grad_accum={config.train.grad_accum}"


def suggest_dividing_mesh(config: Config, topology: Topology) -> str:
    """Suggests, as flags, a mesh over which the config divides; otherwise a number of devices."""
    found = [one for one in candidates(config, topology) if one.model.remat == "full"]
    if found:
        best = min(found, key=lambda one: (one.mesh.tensor, one.train.grad_accum, one.mesh.data))
        return f"try {flags_for(best, remat=False)}"
    batch = config.train.global_batch
    sizes = [size for size in range(1, topology.devices) if batch % size == 0]
    return f"its {batch} sequences divide over {sizes[-1] if sizes else 1} devices"
