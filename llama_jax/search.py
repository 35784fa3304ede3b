"""What else would fit, and what would be faster: mesh shapes, remat policies, microbatches.

An analytic estimate sorts the candidates; the compiler has the last word on the best of them.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator
from typing import Any

from llama_jax.ahead import with_slices
from llama_jax.chips import GIB
from llama_jax.config import Config
from llama_jax.errors import UserError
from llama_jax.lora import adapter_count, flops_by_part, frozen_bytes
from llama_jax.lora_config import NF4_BLOCK
from llama_jax.mesh import mesh_shape
from llama_jax.model_config import REMAT_NAMES
from llama_jax.topology import Topology

TENSOR_SIZES = (1, 2, 4, 8)
MARGIN = 0.9  # of the memory, that a candidate may take by the estimate
NF4_TRAFFIC = 6.0  # bytes that move when a weight is unpacked, as compiled for GPUs
MOST_MICROBATCHES = 64  # of a candidate


def _policies() -> list[str]:
    """Remat policies, from the one that keeps least; names that there are not are left out."""
    sets = (
        ("attn_context",),
        ("q", "k", "v", "attn_context"),
        ("q", "k", "v", "attn_context", "attn_out"),
        ("q", "k", "v", "attn_context", "attn_out", "mlp_gate", "mlp_up"),
    )
    known = [names for names in sets if set(names) <= set(REMAT_NAMES)]
    return ["full", *(f"save:{','.join(names)}" for names in known), "none"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """By hand, without a compiler: bytes of one device, seconds of a step."""

    total: float
    seconds: float


def estimate(config: Config, topology: Topology) -> Estimate:
    """Memory and time of a step, as far as a page of arithmetic goes.

    Raises:
      UserError: the mesh does not cover the devices.
    """
    model, train, chip = config.model, config.train, topology.chip
    outer = dataclasses.asdict(config.dcn)
    groups = math.prod(outer.values())
    mesh = mesh_shape(config.mesh, topology.devices // groups)
    sizes = {axis: mesh[axis] * outer[axis] for axis in mesh}
    tensor, shards = sizes["tensor"], sizes["fsdp"] * sizes["context"]
    trained, frozen, gathered = _weights(config)
    moments = 4 + (2 if config.optim.moment_dtype == "bfloat16" else 4)
    state = (4 + moments + 4 * (1 + (train.grad_accum > 1))) * trained + frozen
    state /= shards * tensor
    layer = 2 * model.parameter_count() / model.n_layers / tensor
    tokens = train.tokens_per_step / train.grad_accum / (sizes["data"] * shards)
    kept = tokens * 2 * (model.dim + _kept_width(config) / tensor) * model.n_layers
    working = tokens * 2 * (8 * model.dim + 6 * model.ffn_dim / tensor)
    chunk = min(1.0, train.loss_chunk / train.seq_len)
    logits = tokens * chunk * model.vocab_size / tensor * 12
    heads = 2 * model.vocab_size * model.dim / tensor * 4
    # Of frozen weights a layer is unpacked or gathered; of trained ones there are gradients too.
    total = state + kept + max(working, logits)
    total += layer if config.lora.rank else 3 * layer + heads

    parts = flops_by_part(model, config.lora, train.seq_len)
    flops = sum(parts.values()) * train.tokens_per_step / topology.devices
    flops *= 1 + _recomputed(config) / (2 if config.lora.rank else 3)
    compute = flops / (0.9 * chip.matmul_efficiency * chip.peak_flops)
    passes = (2 + (model.remat != "none")) * train.grad_accum
    if config.lora.rank and config.lora.base_dtype == "nf4":
        unpacked = model.parameter_count() / tensor
        compute += passes * NF4_TRAFFIC * unpacked / chip.hbm_bandwidth
    gathers = passes * gathered / tensor
    local = _fast_network(topology)
    spans = shards > max(1, local // tensor)
    cards = max(1, min(shards, local // tensor))
    speed = min(chip.link_bandwidth, cards * chip.network_bandwidth) if spans else None
    network = gathers / (speed or chip.link_bandwidth) if shards > 1 else 0.0
    if tensor > 1:  # two all-reduces of the activations a layer, forward and backward
        moved = 8 * tokens * train.grad_accum * model.dim * 2 * model.n_layers
        network += moved / chip.link_bandwidth
    if sizes["data"] > 1:
        outside = sizes["data"] * shards * tensor > local
        wire = chip.network_bandwidth if outside else chip.link_bandwidth
        network += 2 * 4 * trained / (shards * tensor) / wire
    if not chip.torus:  # a ring of many GPUs takes time for the shortest message
        network += 16 * model.n_layers * train.grad_accum * shards * 2e-6
    return Estimate(total, max(compute, network) + 0.2 * min(compute, network))


def _weights(config: Config) -> tuple[float, float, float]:
    """Number of trained weights, bytes of frozen ones, bytes that a gather of all of them moves."""
    if not config.lora.rank:
        count = config.model.parameter_count()
        return count, 0.0, 2.0 * count
    frozen = frozen_bytes(config.model, config.lora)
    adapters = adapter_count(config.model, config.lora)
    return adapters, frozen, frozen + 4.0 * adapters


def _fast_network(topology: Topology) -> int:
    """Devices that the fast network joins."""
    chip = topology.chip
    size = math.prod(topology.shape) if chip.torus else topology.shape[1]
    return size * chip.devices_per_chip


def _kept_width(config: Config) -> float:
    """Elements that a layer keeps of each token, beside its input."""
    model = config.model
    heads, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    widths = {"q": heads, "k": kv, "v": kv, "attn_context": heads, "attn_out": model.dim}
    widths |= {"mlp_gate": model.ffn_dim, "mlp_up": model.ffn_dim, "block_in": 0}
    if model.remat in ("none", "dots"):
        # Also what is between the matrix products: norms, and gate times up.
        extra = 3 * model.dim + model.ffn_dim if model.remat == "none" else 0
        return sum(widths.values()) + extra
    offloaded = model.dim if "block_in" in model.remat_names("offload") else 0
    return sum(widths[name] for name in model.remat_names("save")) - offloaded


def _recomputed(config: Config) -> float:
    """Share of the forward pass that the backward pass does again."""
    model = config.model
    if model.remat in ("none", "dots"):
        return 0.0
    weights = {"q": 1.0, "k": 0.5, "v": 0.5, "attn_out": 1.0, "mlp_gate": 2.7, "mlp_up": 2.7}
    names = (*model.remat_names("save"), *model.remat_names("offload"))
    saved = sum(weights.get(name, 0.0) for name in names)
    return max(0.0, 5.4 + 3.0 - saved) / (3 * 2.7 + 3.0 + 1.0)


def _changed(config: Config, sizes: dict[str, int], remat: str, accum: int) -> Config:
    return dataclasses.replace(
        config,
        mesh=dataclasses.replace(config.mesh, **sizes),
        model=dataclasses.replace(config.model, remat=remat),
        train=dataclasses.replace(config.train, grad_accum=accum),
    )


def _divides(config: Config, sizes: dict[str, int], accum: int, outer: int) -> bool:
    model, train = config.model, config.train
    rows = sizes["data"] * sizes["fsdp"] * outer
    shards = sizes["fsdp"] * sizes["context"]
    tensor = sizes["tensor"]
    split = [model.n_kv_heads, model.n_heads, model.ffn_dim, model.vocab_size]
    block = NF4_BLOCK if config.lora.rank and config.lora.base_dtype == "nf4" else 1
    if block > 1:
        split += [model.ffn_dim // block, model.n_heads * model.head_dim // block]
    return (
        train.global_batch % (accum * rows) == 0
        and model.dim // block % shards == 0
        and all(size % tensor == 0 for size in split)
    )


def _accumulations(config: Config) -> list[int]:
    """Numbers of microbatches that the global batch divides into, from 1 on."""
    batch = config.train.global_batch
    return [size for size in range(1, batch + 1) if batch % size == 0]


def candidates(config: Config, topology: Topology) -> Iterator[Config]:
    """Configs that divide over the machine, in no order."""
    outer = math.prod(dataclasses.asdict(config.dcn).values())
    inner = topology.devices // outer
    context = config.mesh.context if config.mesh.context > 0 else 1
    accums = [size for size in _accumulations(config) if size <= MOST_MICROBATCHES]
    for tensor in TENSOR_SIZES:
        rest, left = divmod(inner, tensor * context)
        for fsdp in (size for size in range(1, rest + 1) if not left and rest % size == 0):
            sizes = {"data": rest // fsdp, "fsdp": fsdp, "context": context, "tensor": tensor}
            for accum in accums:
                if not _divides(config, sizes, accum, config.dcn.data):
                    continue
                for remat in _policies():
                    yield _changed(config, sizes, remat, accum)


def options(config: Config, remat: bool = True) -> str:
    """The flags that make a candidate of the config file."""
    mesh = " ".join(
        f"--config.mesh.{axis}={size}" for axis, size in dataclasses.asdict(config.mesh).items()
    )
    policy = f" --config.model.remat={config.model.remat}" if remat else ""
    return f"{mesh}{policy} --config.train.grad_accum={config.train.grad_accum}"


def search(config: Config, topology: Topology, limit: int, price: float) -> dict[str, Any]:
    """Compiles the candidates that the estimate likes best.

    Returns:
      The plan of the fastest that fits, with `options` and, of all that were compiled, `tried`.

    Raises:
      UserError: none fits, or none divides.
    """
    from llama_jax.plan import plan

    config = with_slices(config, topology.slices)
    capacity = topology.chip.hbm_bytes
    rated = [(estimate(one, topology), one) for one in candidates(config, topology)]
    if not rated:
        raise UserError(
            f"train.global_batch={config.train.global_batch} divides over no mesh of "
            f"{topology.devices} devices; try a multiple of {topology.devices}"
        )
    fitting = [pair for pair in rated if pair[0].total <= MARGIN * capacity]
    fitting = fitting or [min(rated, key=lambda pair: pair[0].total)]
    fitting.sort(key=lambda pair: pair[0].seconds)
    chosen, tried, best = _varied(fitting, limit), [], None
    for number, (guess, one) in enumerate(chosen, 1):
        result = plan(one, topology, price)
        used = result["bytes_per_chip"]["total"] / GIB
        step, mfu = result["step_seconds"], result["mfu_6n"]
        said = f"{step:.3f} s, MFU {mfu:.1%}" if step else "does not compile"
        fits = "fits" if result["fits"] else "does NOT fit"
        line = f"{number}/{len(chosen)} {options(one)}: {used:.2f} GiB, {fits}, {said}"
        print(line, file=sys.stderr, flush=True)
        result |= {"options": options(one)}
        tried.append({"options": options(one), "fits": result["fits"], "step_seconds": step})
        tried[-1] |= {"mfu_6n": mfu, "total": result["bytes_per_chip"]["total"]}
        tried[-1] |= {"estimate": dataclasses.asdict(guess)}
        if result["fits"] and (best is None or step < best["step_seconds"]):
            best = result
    if best is None:
        raise UserError(f"none of {len(tried)} candidates fits {topology}; take more chips")
    return {**best, "tried": tried}


def _varied(rated: list[tuple[Estimate, Config]], limit: int) -> list[tuple[Estimate, Config]]:
    """The first of each mesh in turn, so that one error of the estimate does not fill the list."""
    seen: dict[tuple[int, ...], int] = {}
    picked: list[tuple[Estimate, Config]] = []
    for pair in rated:
        mesh = dataclasses.astuple(pair[1].mesh)
        seen[mesh] = seen.get(mesh, 0) + 1
        if seen[mesh] <= 2 and len(picked) < limit:
            picked.append(pair)
    return picked


def advice(config: Config, topology: Topology, result: dict[str, Any]) -> list[str]:
    """What would make a plan fit that does not, by the estimate, scaled to the compiler's figure.

    Returns:
      Options, each with its estimated bytes; those that change least come first.
    """
    config = with_slices(config, topology.slices)
    sizes = result["bytes_per_chip"]
    each = topology.chip.devices_per_chip
    guess = estimate(config, topology)
    scale = max(1.0, sizes["total"] / each / guess.total)
    found: dict[str, str] = {}
    for kind, text, one, where in _remedies(config, topology, dict(result["mesh"])):
        needed = scale * estimate(one, where).total
        if kind not in found and needed <= topology.chip.hbm_bytes:
            found[kind] = f"{text} (about {needed * each / GIB:.1f} GiB a chip)"
    return list(found.values()) or ["nothing that one change does: take several times the chips"]


def what_divides(config: Config, topology: Topology) -> str:
    """A mesh over which the config divides on this machine, as flags, or a machine that it does."""
    found = [one for one in candidates(config, topology) if one.model.remat == "full"]
    if found:
        best = min(found, key=lambda one: (one.mesh.tensor, one.train.grad_accum, one.mesh.data))
        return f"try {options(best, remat=False)}"
    batch = config.train.global_batch
    sizes = [size for size in range(1, topology.devices) if batch % size == 0]
    return f"its {batch} sequences divide over {sizes[-1] if sizes else 1} devices"


def _accumulated(config: Config, sizes: dict[str, int]) -> Iterator[tuple[str, Config]]:
    """Full rematerialisation in more and more microbatches, as flags and as a config."""
    for accum in _accumulations(config):
        if accum > config.train.grad_accum and _divides(config, sizes, accum, config.dcn.data):
            text = f"--config.model.remat=full --config.train.grad_accum={accum}"
            yield text, _changed(config, sizes, "full", accum)


def _in_nf4(config: Config) -> Config | None:
    """The config with its frozen base in NF4; None where there is none, or it is so already."""
    model, lora = config.model, config.lora
    inputs = (model.dim, model.ffn_dim, model.n_heads * model.head_dim)
    if not lora.rank or lora.base_dtype == "nf4" or any(size % NF4_BLOCK for size in inputs):
        return None
    return dataclasses.replace(config, lora=dataclasses.replace(lora, base_dtype="nf4"))


def _remedies(
    config: Config, topology: Topology, mesh: dict[str, int]
) -> Iterator[tuple[str, str, Config, Topology]]:
    """Changes of each kind from the smallest on; kinds from what costs least."""
    outer = dataclasses.asdict(config.dcn)
    inner = {axis: mesh[axis] // max(1, outer[axis]) for axis in mesh}
    remats = _policies()
    current = remats.index(config.model.remat) if config.model.remat in remats else len(remats)
    for remat in reversed(remats[:current]):
        changed = _changed(config, inner, remat, config.train.grad_accum)
        yield "remat", f"--config.model.remat={remat}", changed, topology
    least = "full"
    for text, changed in _accumulated(config, inner):
        yield "accumulate", text, changed, topology
    smaller = _in_nf4(config)
    if smaller and _divides(smaller, inner, smaller.train.grad_accum, config.dcn.data):
        flag = "--config.lora.base_dtype=nf4"
        yield "base", flag, smaller, topology
        for text, changed in _accumulated(smaller, inner):
            yield "base", f"{flag} {text}", changed, topology
    if inner["data"] > 1:
        wide = {**inner, "data": 1, "fsdp": inner["fsdp"] * inner["data"]}
        if config.model.dim % (wide["fsdp"] * wide["context"]) == 0:
            changed = _changed(config, wide, least, config.train.grad_accum)
            text = f"--config.mesh.data=1 --config.mesh.fsdp={wide['fsdp']}"
            yield "fsdp", text, changed, topology
    for tensor in (2, 4, 8):
        split = {**inner, "tensor": tensor, "fsdp": inner["fsdp"] * inner["tensor"] // tensor}
        if split["fsdp"] and _divides(config, split, config.train.grad_accum, config.dcn.data):
            changed = _changed(config, split, least, config.train.grad_accum)
            text = f"--config.mesh.tensor={tensor} --config.mesh.fsdp={split['fsdp']}"
            yield "tensor", text, changed, topology
    for times in (2, 4, 8, 16, 32, 64):
        shape = (*topology.shape[:-1], topology.shape[-1] * times)
        if not topology.chip.torus:
            shape = (topology.shape[0] * times, topology.shape[1])
        bigger = dataclasses.replace(topology, shape=shape)
        wide = {**inner, "fsdp": inner["fsdp"] * times}
        if _divides(config, wide, config.train.grad_accum, config.dcn.data):
            changed = _changed(config, wide, config.model.remat, config.train.grad_accum)
            yield "chips", f"--topology={bigger.slice_name}: {bigger.chips} chips", changed, bigger
