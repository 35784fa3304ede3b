"""Placement of arrays: parameters by the table in `parameters`, activations by a table here.

There is no silent default: a parameter without a row, a row without a parameter, and a dimension
that its mesh axes do not divide raise an error that names the path.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.errors import UserError
from llama_jax.parallel.mesh import DoesNotDivide
from llama_jax.parameters import PARAMETERS, SHARD, Parameter, Table, path_of, row_of

ACTIVATION_AXES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "seq": "context",
    # For the residual stream: norms and sums are divided over tensor too, and with them the arrays
    # that stay for the backward pass (Megatron's sequence parallelism, arXiv:2205.05198).
    "residual_seq": ("context", "tensor"),
    "embed": None,
    "heads": "tensor",
    "head_dim": None,
    "ffn": "tensor",
    "vocab": "tensor",
}

BATCH_SPEC = P(ACTIVATION_AXES["batch"], ACTIVATION_AXES["seq"])  # B T


def activation_spec(*names: str | None) -> P:
    """Returns the spec of an activation whose dimensions are `names` (rows of `ACTIVATION_AXES`).

    Raises:
      ValueError: a name is unknown, or two dimensions use the same mesh axis.
    """
    entries = []
    for name in names:
        if name is not None and name not in ACTIVATION_AXES:
            raise ValueError(f"unknown activation axis {name!r}; known: {list(ACTIVATION_AXES)}")
        entries.append(None if name is None else ACTIVATION_AXES[name])
    used = [axis for entry in entries for axis in mesh_axes(entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"activation axes {names} put two dimensions on one mesh axis: {used}")
    return P(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation to its placement on the mesh; without a mesh, returns it unchanged.

    Uses the mesh of `jax.set_mesh`. Inside `jax.shard_map` it leaves out the manual axes, because x
    is one device's part along them.
    """
    spec = activation_spec(*names)
    if len(names) != x.ndim:
        raise ValueError(f"constrain got {len(names)} axis names for an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    free = [
        tuple(axis for axis in mesh_axes(entry) if axis not in mesh.manual_axes) for entry in spec
    ]
    for place, name in enumerate(names):  # an indivisible vocabulary stays whole, see param_specs
        if name == "vocab" and x.shape[place] % math.prod(mesh.shape[axis] for axis in free[place]):
            free[place] = ()
    return jax.lax.with_sharding_constraint(x, P(*(axes or None for axes in free)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def reshard(x: jax.Array, names: tuple[str, ...], gradient_names: tuple[str, ...]) -> jax.Array:
    """Constrains an activation to one placement, and its gradient to another; see `constrain`.

    Args:
      x: the activation.
      names: the dimensions of `x`, for `constrain`.
      gradient_names: the same for the gradient.
    """
    return constrain(x, *names)


def _reshard_forward(
    x: jax.Array, names: tuple[str, ...], gradient_names: tuple[str, ...]
) -> tuple[jax.Array, None]:
    return constrain(x, *names), None


def _reshard_backward(
    names: tuple[str, ...], gradient_names: tuple[str, ...], _: None, d_out: jax.Array
) -> tuple[jax.Array]:
    return (constrain(d_out, *gradient_names),)


reshard.defvjp(_reshard_forward, _reshard_backward)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one dimension of a spec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def devices_along(name: str, sizes: Mapping[str, int] | None = None) -> int:
    """Returns the number of devices that divide a dimension of activations between them.

    Args:
      name: the dimension, a row of `ACTIVATION_AXES`.
      sizes: devices along each mesh axis, such as `mesh.shape`; None: use the mesh of
        `jax.set_mesh`, and 1 without a mesh.
    """
    axes = mesh_axes(ACTIVATION_AXES[name])
    if sizes is None:
        mesh = jax.sharding.get_abstract_mesh()
        sizes = dict.fromkeys(axes, 1) if mesh.empty else mesh.shape
    return math.prod(sizes[axis] for axis in axes)


def weight_shards(sizes: Mapping[str, int]) -> int:
    """Returns the number of devices that divide each matrix, not counting the axis `tensor`."""
    return math.prod(sizes[axis] for axis in SHARD)


def param_specs(
    params: Any,
    mesh: Mesh | jax.sharding.AbstractMesh,
    *,
    rows: Table = PARAMETERS,
    any_vocabulary: bool = False,
) -> Any:
    """Returns the partition spec of each parameter, as a tree like `params`.

    Args:
      params: nested dict of arrays or `ShapeDtypeStruct`s.
      mesh: the mesh whose axis sizes must divide the dimensions.
      rows: the table of the model.
      any_vocabulary: whether to leave a vocabulary whole that `tensor` does not divide. For
        inference only: in training this would cost memory and time on each device.

    Raises:
      UserError: a parameter has no row, a row has no parameter, a mesh axis is unknown, or the
        dimensions of an array are not those of its row.
      DoesNotDivide: a dimension does not divide over its mesh axes.
    """
    leaves, treedef = jax.tree.flatten_with_path(params)
    named = {path_of(keys): leaf for keys, leaf in leaves}
    known = {row.path for path in named if (row := row_of(path, rows))}
    stale = {row.path for row in rows.values() if row.when is None} - known
    if stale and not any(path.endswith("/a") for path in named):  # not every matrix has an adapter
        raise UserError(f"sharding table: no parameter for row(s) {', '.join(sorted(stale))}")
    _check_sizes({path: leaf.shape for path, leaf in named.items()}, rows)
    specs = []
    for path, leaf in named.items():
        row = row_of(path, rows)
        spec = None if row is None else _placement(row, path.removeprefix(row.path))
        if row is None or spec is None:
            raise UserError(f"sharding table: no row for parameter {path} {leaf.shape}")
        if any_vocabulary and path == row.path and "V" in row.axes:
            spec = _undivided(spec, row.axes.index("V"), leaf.shape, mesh)
        _check_divides(row, path, leaf.shape, spec, mesh)
        specs.append(spec)
    return jax.tree.unflatten(treedef, specs)


def _undivided(
    spec: P, place: int, shape: tuple[int, ...], mesh: Mesh | jax.sharding.AbstractMesh
) -> P:
    """Removes the mesh axes of one dimension from a spec, if they do not divide it."""
    if shape[place] % math.prod(mesh.shape[axis] for axis in mesh_axes(spec[place])) == 0:
        return spec
    return P(*(None if number == place else entry for number, entry in enumerate(spec)))


def _placement(row: Parameter, part: str) -> P | None:
    """Returns the spec of an array, or of a part of its adapter or of its NF4 form; or None.

    Args:
      row: the row of the array.
      part: the rest of the path after that of the row, such as `/a`; empty for the array itself.
    """
    if not part:
        return row.placement
    if not row.is_matrix or not row.is_stacked:
        return None
    split = 1 + len(row.inputs)
    inputs, outputs = row.placement[1:split], row.placement[split:]
    return {
        "/a": P(None, *inputs, None),
        "/b": P(None, None, *outputs),
        "/codes": P(None, inputs[0], *outputs),
        "/scales": P(None, inputs[0], *outputs),
        "/groups": P(),
        "/offset": P(),
    }.get(part)


def _check_sizes(shapes: Mapping[str, tuple[int, ...]], rows: Table) -> None:
    """Checks that each letter of the table means the same size in all arrays.

    Raises:
      UserError: a letter has two sizes, or an array has more or fewer dimensions than its row.
    """
    first: dict[str, tuple[int, str]] = {}
    for path, shape in shapes.items():
        if path not in rows:  # an adapter, or a part in NF4
            continue
        axes = rows[path].axes
        if len(shape) != len(axes):
            raise UserError(f"{path} has shape {shape}, but its row has the dimensions {axes}")
        for letter, size in zip(axes, shape, strict=True):
            known, where = first.setdefault(letter, (size, path))
            if size != known:
                raise UserError(
                    f"{path} has shape {shape}, where {axes} makes {letter} {size}, but {letter} "
                    f"is {known} in {where}"
                )


def _check_divides(
    row: Parameter,
    path: str,
    shape: tuple[int, ...],
    spec: P,
    mesh: Mesh | jax.sharding.AbstractMesh,
) -> None:
    used = [axis for entry in spec for axis in mesh_axes(entry)]
    if len(used) != len(set(used)):
        raise UserError(f"{path}: its spec {spec} uses a mesh axis twice")
    for place, (size, entry) in enumerate(zip(shape, spec, strict=False)):
        axes = mesh_axes(entry)
        for axis in axes:
            if axis not in mesh.shape:
                raise UserError(f"{path}: the mesh {dict(mesh.shape)} has no axis {axis!r}")
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            vocabulary = path == row.path and row.axes[place] == "V"
            raise DoesNotDivide(
                f"{path} of shape {shape}: a dimension of {size} does not divide over "
                f"{' x '.join(axes)} = {parts} devices" + (_pad(size, parts) if vocabulary else "")
            )


def _pad(rows: int, parts: int) -> str:
    """Suggests a vocabulary size, a multiple of 64, that divides over `parts` devices."""
    block = math.lcm(64, parts)
    return (
        f"; model.vocab_size={-(-rows // block) * block} does (rows beyond the tokenizer's ids are "
        "padding), or change mesh.tensor"
    )


def param_shardings(
    params: Any, mesh: Mesh, *, rows: Table = PARAMETERS, any_vocabulary: bool = False
) -> Any:
    """Returns the sharding of each parameter, for `jit` and restoring.

    Args:
      params, mesh, rows, any_vocabulary: see `param_specs`, also for the errors.
    """
    specs = param_specs(params, mesh, rows=rows, any_vocabulary=any_vocabulary)
    return named_shardings(specs, mesh)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Adds shardings to a tree of shapes and dtypes; returns `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def bytes_per_device(tree: Any) -> int:
    """Counts the bytes that one device holds of a tree of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def named_shardings(specs: Any, mesh: Mesh) -> Any:
    """Binds a tree of partition specs to a mesh; returns shardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch of shape (global_batch, seq_len)."""
    return NamedSharding(mesh, BATCH_SPEC)


def check_batch(global_batch: int, seq_len: int, grad_accum: int, mesh: Mesh) -> None:
    """Checks that each microbatch divides over the mesh.

    Args:
      global_batch: sequences per step, over all hosts.
      seq_len: tokens per sequence.
      grad_accum: microbatches per step.
      mesh: the mesh.

    Raises:
      DoesNotDivide: a number does not divide; the message names it.
    """
    rows, context, parts = (
        devices_along(name, mesh.shape) for name in ("batch", "seq", "residual_seq")
    )
    micro = global_batch // grad_accum
    if micro % rows:
        raise DoesNotDivide(
            f"train.global_batch={global_batch} / train.grad_accum={grad_accum} = {micro} "
            f"sequences do not divide over data x fsdp = {rows} devices"
        )
    if context > 1 and seq_len % (2 * context):
        raise DoesNotDivide(
            f"train.seq_len={seq_len} does not divide into two chunks for each of "
            f"context={context} devices"
        )
    if seq_len % parts:
        raise DoesNotDivide(
            f"train.seq_len={seq_len} does not divide over context x tensor = {parts} devices"
        )
