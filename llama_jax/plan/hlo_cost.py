"""FLOPs and memory traffic of HLO instructions, for a roofline.

XLA's own cost analysis counts the body of a loop once, and ignores kernels.
"""

import collections
import math
import re

from llama_jax.plan.hlo import Instruction, Module, dimensions, dtype_of, hbm_bytes, shape_bytes

# Number of matrix products in an attention kernel, by the first name here that its text contains.
# Forward: scores and weighted values. Backward: scores again and four gradients; kernels that
# compute d_q separately from d_k and d_v compute the scores and their gradient twice.
_KERNELS = (
    ("preprocess_backward", 0),
    ("splash_mha_dkv", 4),
    ("splash_mha_dq", 3),
    ("splash_mha_fwd", 2),
    ("splash", 2),
    ("mha_backward", 7),
    ("mha_forward", 2),
    ("SoftmaxBackward", 5),
    ("Softmax", 2),
)
# Opcodes that move no bytes: names of values, and ends of operations counted at their start.
_FREE = (
    *("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "after-all"),
    *("partition-id", "replica-id", "while", "conditional", "call", "opt-barrier"),
)


def _kernel(one: Instruction) -> int | None:
    text = one.line.split("backend_config=")[0]
    if not re.search(
        r'custom_call_target="(tpu_custom_call|__cudnn\$fmha|__gpu\$xla|triton)', text
    ):
        return None
    return next((flops_by_dtypes for name, flops_by_dtypes in _KERNELS if name in text), None)


def flops_by_dtypes(
    one: Instruction, scope: dict[str, Instruction], module: Module
) -> dict[tuple[str, ...], float]:
    """Counts the FLOPs of one run of an instruction, by the dtypes of the multiplied operands.

    A loop or call has none: its FLOPs belong to the instructions that it runs.

    Args:
      one: the instruction.
      scope: the instructions of its computation, by name.
      module: the program.
    """
    if one.opcode == "fusion":
        inner = module.computations.get(one.called[0], {}) if one.called else {}
        total: collections.Counter[tuple[str, ...]] = collections.Counter()
        for each in inner.values():
            for dtypes, found in flops_by_dtypes(each, inner, module).items():
                total[dtypes] += found  # type: ignore[assignment]
        return dict(total)
    if one.opcode == "dot" or "__cublas$" in one.line:
        found = _dot(one, scope)
    elif one.opcode == "convolution":
        found = _convolution(one, scope)
    else:
        found = kernel_flops(one)
        return {(): found} if found else {}
    operands = [scope[name] for name in one.operands[:2] if name in scope]
    return {tuple(dtype_of(each.shape) for each in operands): found}


def flops(one: Instruction, scope: dict[str, Instruction], module: Module) -> float:
    """Counts the FLOPs of one run of an instruction.

    Args:
      one, scope, module: see `flops_by_dtypes`.
    """
    return sum(flops_by_dtypes(one, scope, module).values())


def _dot(one: Instruction, scope: dict[str, Instruction]) -> float:
    """Counts the FLOPs of a `dot`, or of the cuBLAS call that replaces one."""
    left = dimensions(scope[one.operands[0]].shape)
    axes = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', one.line)
    contracted = [left[int(axis)] for axis in re.findall(r"\d+", axes[1])] if axes else []
    return 2.0 * math.prod(dimensions(one.shape)) * math.prod(contracted)


def _convolution(one: Instruction, scope: dict[str, Instruction]) -> float:
    """Counts the FLOPs of a matrix product that the TPU compiler writes as a convolution.

    A spatial dimension is contracted, or is a batch dimension padded on all sides. The number of
    pairs that are multiplied is the window times the shorter of input and output.
    """
    found = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.line)
    window = re.search(r"window=\{size=([\dx]+)", one.line)
    if found is None:
        return 0.0
    left, right, out = (
        dict(zip(labels, dimensions(shape), strict=True))
        for labels, shape in (
            (found[1], scope[one.operands[0]].shape),
            (found[2], scope[one.operands[1]].shape),
            (found[3], one.shape),
        )
    )
    spatial = window[1].split("x") if window else []
    pairs = [int(w) * min(left[str(n)], out[str(n)]) for n, w in enumerate(spatial)]
    return 2.0 * math.prod(pairs) * out["b"] * out["f"] * right["i"]


def kernel_flops(one: Instruction) -> float:
    """Counts the FLOPs of an attention kernel: half of the square, because of the causal mask."""
    products = _kernel(one) if one.opcode == "custom-call" else None
    if not products:
        return 0.0
    listed = re.search(r"operand_layout_constraints=\{(.*?\}\}|.*?\})(?:, |$)", one.line)
    arrays = re.findall(r"(?:bf16|f16|f32)\[(?:\d+,){2,3}\d+\]", listed[1] if listed else one.line)
    if len(arrays) < 2:
        return 0.0
    queries = dimensions(arrays[0])
    # The fused backward kernel of splash also returns d_q, once per tile of keys.
    partial = rf"\[(?:\d+,){{{len(queries)}}}\d+\]"
    if "splash_mha_dkv" in one.line and re.search(partial, one.shape):
        products = 5
    # Splash takes B N T H (N T H if a device has one sequence), the kernels for GPUs B T N H.
    keys = dimensions(arrays[1])[-2 if "tpu_custom_call" in one.line else 1]
    return float(products * math.prod(queries) * keys)


def traffic(one: Instruction, scope: dict[str, Instruction], module: Module) -> float:
    """Counts the bytes that an instruction reads from and writes to the device's memory.

    A slice of an operand reads only the slice; an update in place writes only the update.

    Args:
      one: the instruction.
      scope: the instructions of its computation, by name.
      module: the program.
    """
    operands = [scope[name] for name in one.operands if name in scope]
    if one.opcode == "copy-start":
        return float(sum(hbm_bytes(each.shape) for each in operands))
    if one.opcode in _FREE or one.collective or one.opcode.endswith(("-start", "-done", "-update")):
        return 0.0
    if one.opcode == "fusion":
        inner = module.computations.get(one.called[0], {}) if one.called else {}
        return _fusion_traffic(one, operands, inner)
    if one.opcode == "dynamic-slice" or one.opcode == "gather":
        return 2.0 * hbm_bytes(one.shape)
    if one.opcode == "dynamic-update-slice":
        return 2.0 * hbm_bytes(operands[1].shape) if len(operands) > 1 else 0.0
    read = sum(hbm_bytes(each.shape) for each in operands)
    return float(read + hbm_bytes(one.shape))


def _fusion_traffic(
    one: Instruction, operands: list[Instruction], inner: dict[str, Instruction]
) -> float:
    users: dict[str, list[Instruction]] = {}
    for each in inner.values():
        for name in each.operands:
            users.setdefault(name, []).append(each)
    places = {}
    for each in inner.values():
        if each.opcode == "parameter":
            number = re.search(r" parameter\((\d+)\)", each.line)
            places[int(number[1]) if number else 0] = each
    total = 0.0
    for place, operand in enumerate(operands):
        whole = hbm_bytes(operand.shape)
        read = _read(places[place].name, users) if place in places else None
        total += whole if read is None else min(whole, read)
    written, roots = hbm_bytes(one.shape), [each for each in inner.values() if each.is_root]
    if roots and roots[0].opcode == "tuple":
        roots = [inner[name] for name in roots[0].operands if name in inner]
    for root in roots:
        source = _behind(root, inner)
        if source.opcode == "dynamic-update-slice" and source.operands[1] in inner:
            update = shape_bytes(inner[source.operands[1]].shape)
            written -= max(0, shape_bytes(source.shape) - update)
    return total + max(0, written)


def _read(name: str, users: dict[str, list[Instruction]]) -> float | None:
    """Counts the bytes read of a parameter that a fusion only slices or updates, or None."""
    total = 0.0
    for user in users.get(name, []):
        if user.opcode in ("dynamic-slice", "gather") and user.operands[0] == name:
            total += shape_bytes(user.shape)
        elif user.opcode == "bitcast":
            behind = _read(user.name, users)
            if behind is None:
                return None
            total += behind
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
            return None
    return total


def _behind(one: Instruction, inner: dict[str, Instruction]) -> Instruction:
    while one.opcode == "bitcast" and one.operands and one.operands[0] in inner:
        one = inner[one.operands[0]]
    return one
