"""Advice on a program that does not fit: one change of the config, or a larger machine."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from llama_jax.config import NF4_BLOCK, Config
from llama_jax.hardware.chips import GIB
from llama_jax.hardware.topology import Topology
from llama_jax.plan.candidates import (
    divides,
    microbatch_counts,
    remat_policies,
    with_dcn,
    with_options,
)
from llama_jax.plan.estimate import estimate

# A kind of remedy, its flags, and the config and machine that they make.
Remedy = tuple[str, str, Config, Topology]


def advice(config: Config, topology: Topology, result: dict[str, Any]) -> list[str]:
    """Lists changes that would make a plan fit, by estimates scaled to the compiler's figure.

    The flags do not repeat values that the config already has.

    Args:
      config: the run.
      topology: the machine.
      result: the result of `plan`; reads `bytes_per_chip` and `mesh`.

    Returns:
      The changes, each with its estimated GiB; the smallest changes come first.
    """
    config = with_dcn(config, topology)
    sizes = result["bytes_per_chip"]
    each = topology.chip.devices_per_chip
    guess = estimate(config, topology)
    scale = max(1.0, sizes["total"] / each / guess.total)
    found: dict[str, str] = {}
    for kind, text, one, where in _remedies(config, topology, dict(result["mesh"])):
        needed = scale * estimate(one, where).total
        if kind not in found and needed <= topology.chip.hbm_bytes:
            found[kind] = f"{text} (about {needed * each / GIB:.1f} GiB a chip)"
    return list(found.values()) or ["no single change is enough: use several times as many chips"]


def _remedies(config: Config, topology: Topology, mesh: dict[str, int]) -> Iterator[Remedy]:
    """Yields remedies: the cheapest kinds first, and in each kind the smallest change first."""
    outer = dataclasses.asdict(config.dcn)
    inner = {axis: mesh[axis] // max(1, outer[axis]) for axis in mesh}
    here = config.train.grad_accum
    meshes = list(_meshes(config, topology, inner))
    if topology.chip.torus:  # fsdp over the whole slice uses all links, so it costs nothing
        yield from (one for one in meshes if one[0] == "fsdp")
    for remat in reversed(remat_policies()):  # others that keep as much do not fit either
        one = with_options(config, inner, remat, here)
        yield "remat", f"--config.model.remat={remat}", one, topology
    for text, one in _accumulated(config, inner):
        yield "accumulate", text, one, topology
    smaller = _in_nf4(config)
    if smaller and divides(smaller, inner, smaller.train.grad_accum, config.dcn.data):
        flag = "--config.lora.base_dtype=nf4"
        yield "base", flag, smaller, topology
        for text, one in _accumulated(smaller, inner):
            yield "base", f"{flag} {text}", one, topology
    yield from meshes
    yield from _larger(config, topology, inner)


def _meshes(config: Config, topology: Topology, inner: dict[str, int]) -> Iterator[Remedy]:
    """Yields other meshes of the same machine, each with the same and with full remat."""
    every = math.prod(inner.values()) // inner["context"]
    wide = {"data": 1, "fsdp": inner["data"] * inner["fsdp"], "tensor": inner["tensor"]}
    if topology.chip.torus:
        wide = {"data": 1, "fsdp": every, "tensor": 1}
    kinds = [("fsdp", {**inner, **wide})]
    for tensor in (2, 4, 8):
        fsdp, left = divmod(inner["fsdp"] * inner["tensor"], tensor)
        if fsdp and not left:
            kinds.append(("tensor", {**inner, "fsdp": fsdp, "tensor": tensor}))
    for kind, sizes in kinds:
        flags = [
            f"--config.mesh.{axis}={sizes[axis]}" for axis in sizes if sizes[axis] != inner[axis]
        ]
        if not flags or not divides(config, sizes, config.train.grad_accum, config.dcn.data):
            continue
        for remat in dict.fromkeys((config.model.remat, "full")):
            more = [f"--config.model.remat={remat}"] if remat != config.model.remat else []
            one = with_options(config, sizes, remat, config.train.grad_accum)
            yield kind, " ".join(flags + more), one, topology


def _larger(config: Config, topology: Topology, inner: dict[str, int]) -> Iterator[Remedy]:
    """Yields the same config on machines with 2 to 64 times as many chips."""
    for times in (2, 4, 8, 16, 32, 64):
        shape = (*topology.shape[:-1], topology.shape[-1] * times)
        if not topology.chip.torus:
            shape = (topology.shape[0] * times, topology.shape[1])
        bigger = dataclasses.replace(topology, shape=shape)
        wide = {**inner, "fsdp": inner["fsdp"] * times}
        if divides(config, wide, config.train.grad_accum, config.dcn.data):
            one = with_options(config, wide, config.model.remat, config.train.grad_accum)
            yield "chips", f"--topology={bigger.slice_name}: {bigger.chips} chips", one, bigger


def _accumulated(config: Config, sizes: dict[str, int]) -> Iterator[tuple[str, Config]]:
    """Yields configs with full remat and more and more microbatches, with their flags."""
    remat = "" if config.model.remat == "full" else "--config.model.remat=full "
    for accum in microbatch_counts(config):
        if accum > config.train.grad_accum and divides(config, sizes, accum, config.dcn.data):
            one = with_options(config, sizes, "full", accum)
            yield f"{remat}--config.train.grad_accum={accum}", one


def _in_nf4(config: Config) -> Config | None:
    """Returns the config with its base in NF4; None if it has no base, or NF4 is not possible."""
    model, lora = config.model, config.lora
    inputs = (model.dim, model.ffn_dim, model.n_heads * model.head_dim)
    if not lora.rank or lora.base_dtype == "nf4" or any(size % NF4_BLOCK for size in inputs):
        return None
    return dataclasses.replace(config, lora=dataclasses.replace(lora, base_dtype="nf4"))
