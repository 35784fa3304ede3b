"""Memory and time of a train step by a page of arithmetic, to sort candidates."""

import dataclasses
import math

from llama_jax.config import Config, ModelConfig
from llama_jax.hardware.chips import Chip
from llama_jax.hardware.topology import Topology
from llama_jax.hardware.xla_flags import is_switched_on
from llama_jax.model.cost import adapter_count, flops_by_part, frozen_bytes, parameter_count
from llama_jax.parallel.mesh import mesh_shape
from llama_jax.parallel.sharding import devices_along, weight_shards

NF4_TRAFFIC = 6.0  # bytes of memory traffic to unpack one weight, as compiled for GPUs
# Efficiency of matrix products in a step. For GPUs relative to large products alone; for TPUs
# relative to the peak, from the compiler's cycles of our own programs (0.77 to 0.85).
_GPU_PRODUCTS, TPU_PRODUCTS = 0.9, 0.8
# Fraction of the network's or the compute's time, whichever is shorter, that does not overlap.
_GPU_EXPOSED, _TPU_EXPOSED = 0.2, 0.15
# Matrix products in the attention kernels' backward pass; forward there are two (see hlo_cost).
_GPU_BACKWARD, _TPU_BACKWARD = 5, 7
_GPU_HOP = 2e-6  # seconds per GPU that the shortest message takes in a ring


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate of a train step without a compiler.

    Attributes:
      total: bytes of state and temporaries on one device, as `plan` counts them.
      seconds: seconds of a step.
    """

    total: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The division of a config over a machine.

    Attributes:
      tensor: devices that divide a matrix product.
      shards: devices that divide the state, not counting `tensor`.
      replicas: copies of the state, over all slices.
      tokens: tokens of one device in one microbatch.
    """

    tensor: int
    shards: int
    replicas: int
    tokens: float


def estimate(config: Config, topology: Topology) -> Estimate:
    """Estimates memory and time of a step by arithmetic.

    Raises:
      UserError: the mesh does not cover the devices.
    """
    outer = dataclasses.asdict(config.dcn)
    mesh = mesh_shape(config.mesh, topology.devices // math.prod(outer.values()))
    sizes = {axis: mesh[axis] * outer[axis] for axis in mesh}
    tensor, shards = devices_along("heads", sizes), weight_shards(sizes)
    train = config.train
    divided = devices_along("batch", sizes) * devices_along("seq", sizes)
    tokens = train.tokens_per_step / train.grad_accum / divided
    replicas = math.prod(sizes.values()) // (shards * tensor)
    parts = _Parts(tensor, shards, replicas, tokens)
    compute = _compute_seconds(config, topology, parts)
    hidden, waited = _network_seconds(config, topology, parts)
    share = _TPU_EXPOSED if topology.chip.torus else _GPU_EXPOSED
    seconds = max(compute, hidden) + share * min(compute, hidden) + waited
    return Estimate(_bytes(config, topology.chip, parts), seconds)


def _bytes(config: Config, chip: Chip, parts: _Parts) -> float:
    model, train, tensor, tokens = config.model, config.train, parts.tensor, parts.tokens
    trained, frozen, _ = _weights(config)
    moments = 4 + (2 if config.optim.moment_dtype == "bfloat16" else 4)
    state = (4 + moments + 4 * (1 + (train.grad_accum > 1))) * trained + frozen
    state /= parts.shards * tensor
    layer = 2 * parameter_count(model) / model.n_layers / tensor
    # Between the layers, the sequence is divided over `tensor`.
    kept = (
        tokens * 2 * (model.dim + saved_elements_per_token(model, chip)) / tensor * model.n_layers
    )
    # A GPU's loop over microbatches can have two of them in memory at once.
    doubled = is_switched_on("--xla_gpu_enable_while_loop_double_buffering")
    if not chip.torus and train.grad_accum > 1 and doubled:
        kept *= 1.5 if train.grad_accum == 2 else 2
    # Both are fitted to programs of 7B and 65B for v5p and v4, and of 7B to 65B for H100 and A100.
    wide = 4.5 if chip.torus else 6
    working = tokens * 2 * (8 * model.dim + wide * model.ffn_dim) / tensor
    chunk = min(1.0, train.loss_chunk / train.seq_len)
    logits = tokens * chunk * model.vocab_size / tensor * 12
    heads = 2 * model.vocab_size * model.dim / tensor * 4
    total = state + kept + max(working, logits)
    # Frozen weights: one layer is unpacked or gathered. Trained weights need gradients as well; a
    # TPU adds these up one after another.
    return total + (layer if config.lora.rank or chip.torus else 3 * layer + heads)


def _compute_seconds(config: Config, topology: Topology, parts: _Parts) -> float:
    model, train, chip = config.model, config.train, topology.chip
    tokens = train.tokens_per_step / topology.devices
    each = flops_by_part(model, config.lora, train.seq_len)
    products = sum(flops for part, flops in each.items() if part != "attention scores")
    again, kernels = _recomputed(model)
    speed = TPU_PRODUCTS if chip.torus else _GPU_PRODUCTS * chip.matmul_efficiency
    seconds = (products + again) * tokens / (speed * chip.peak_flops)
    # The products of a kernel skip the half of the square that the causal mask hides.
    square = model.n_layers * model.n_heads * model.head_dim * train.seq_len
    backward = _TPU_BACKWARD if chip.torus else _GPU_BACKWARD
    flops = (2 + 2 * kernels + backward) * square * tokens
    seconds += flops / (chip.attention_efficiency * chip.peak_flops)
    if config.lora.rank and config.lora.base_dtype == "nf4":
        unpacked = parameter_count(model) / parts.tensor
        seconds += _passes(config) * NF4_TRAFFIC * unpacked / chip.hbm_bandwidth
    return seconds


def _network_seconds(config: Config, topology: Topology, parts: _Parts) -> tuple[float, float]:
    """Returns the seconds of the network that overlap with compute, and those that do not."""
    model, train, chip = config.model, config.train, topology.chip
    trained, _, gathered = _weights(config)
    shards, tensor, replicas = parts.shards, parts.tensor, parts.replicas
    passes = _passes(config)
    local = _fast_network(topology)
    inside = max(1, local // tensor)  # devices on the fast network per device of `tensor`
    hidden = waited = 0.0
    if shards > 1:
        speed = _bandwidth(topology, min(shards, inside))
        if shards > inside:
            cards = max(1, min(shards, inside))
            speed = min(chip.link_bandwidth, cards * chip.network_bandwidth)
        # A TPU adds up gradients with all-reduces in bfloat16, which send them twice.
        reduced = 4.0 * trained * train.grad_accum if chip.torus else 0.0
        hidden += (passes * gathered + reduced) / tensor / speed
    if tensor > 1:  # two all-reduces of activations per layer, forward and backward
        moved = 8 * parts.tokens * train.grad_accum * model.dim * 2 * model.n_layers
        waited = moved / _bandwidth(topology, min(tensor, local))
        if not chip.torus:
            hidden, waited = hidden + waited, 0.0
    if replicas > 1:
        outside = replicas * shards * tensor > local
        speed = chip.network_bandwidth if outside else _bandwidth(topology, replicas)
        hidden += 2 * 4 * trained / (shards * tensor) / speed
    if not chip.torus:  # in a ring of many GPUs even the shortest message takes time
        hidden += 16 * model.n_layers * train.grad_accum * shards * _GPU_HOP
    return hidden, waited


def _bandwidth(topology: Topology, members: int) -> float:
    """Returns the bytes/s into a device, in one direction, in a group on the fast network.

    On a torus the group uses the links of the dimensions that it fills: two for each dimension that
    wraps around, otherwise one. A group that fills none is a ring of two links, or a line of one.

    Args:
      topology: the machine.
      members: number of devices in the group.
    """
    chip = topology.chip
    if not chip.torus:
        return chip.link_bandwidth
    chips = max(1, members // chip.devices_per_chip)
    links = 0
    for size, wraps in sorted(zip(topology.shape, topology.wrap, strict=True), reverse=True):
        if size > 1 and chips % size == 0:
            chips //= size
            links += 2 if wraps else 1
    if chips > 1:  # the group fills a dimension only in part: one ring through all
        links = min(links, 2) or 1
    return chip.link_bandwidth * max(1, links) / (2 * len(topology.shape))


def _passes(config: Config) -> int:
    """Returns how many times a step gathers the weights."""
    return (2 + (config.model.remat != "none")) * config.train.grad_accum


def _weights(config: Config) -> tuple[float, float, float]:
    """Returns the number of trained weights, the bytes of frozen ones, the bytes of a gather."""
    if not config.lora.rank:
        count = parameter_count(config.model)
        return count, 0.0, 2.0 * count
    frozen = frozen_bytes(config.model, config.lora)
    adapters = adapter_count(config.model, config.lora)
    return adapters, frozen, frozen + 4.0 * adapters


def _fast_network(topology: Topology) -> int:
    """Returns the number of devices that one fast network connects."""
    chip = topology.chip
    size = math.prod(topology.shape) if chip.torus else topology.shape[1]
    return size * chip.devices_per_chip


def saved_elements_per_token(model: ModelConfig, chip: Chip) -> float:
    """Counts the elements per token that a layer keeps, without its input."""
    heads, kv, dim, ffn = (
        model.n_heads * model.head_dim,
        model.n_kv_heads * model.head_dim,
        model.dim,
        model.ffn_dim,
    )
    widths = {"q": heads, "k": kv, "v": kv, "attn_context": heads, "attn_out": dim}
    widths |= {"mlp_gate": ffn, "mlp_up": ffn, "block_in": 0}
    if (
        model.remat == "none" and chip.torus
    ):  # XLA keeps float32 copies and all intermediate results of the MLP
        return 3 * heads + 2 * kv + 7.5 * dim + 5 * ffn
    if model.remat in ("none", "dots"):
        # Also the results between the matrix products: norms, and gate times up.
        extra = 3 * dim + ffn if model.remat == "none" else 0
        return sum(widths.values()) + extra
    offloaded = dim if "block_in" in model.remat_names("offload") else 0
    return sum(widths[name] for name in model.remat_names("save")) - offloaded


def _recomputed(model: ModelConfig) -> tuple[float, bool]:
    """Returns the FLOPs per token of recomputed products, and whether the kernel is recomputed.

    The backward pass needs neither the last product of a block again nor that of the output head.
    """
    if model.remat == "none":
        return 0.0, False
    if model.remat == "dots":
        return 0.0, True
    heads, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    widths = {"q": heads, "k": kv, "v": kv, "attn_out": heads}
    widths |= {"mlp_gate": model.ffn_dim, "mlp_up": model.ffn_dim}
    saved = {*model.remat_names("save"), *model.remat_names("offload")}
    again = sum(width for name, width in widths.items() if name not in saved)
    return 2.0 * model.n_layers * model.dim * again, "attn_context" not in saved
