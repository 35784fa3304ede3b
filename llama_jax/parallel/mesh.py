"""The mesh of devices: it always has four axes; unused ones have size 1."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from llama_jax.config import DcnConfig, MeshConfig
from llama_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


class DoesNotDivide(UserError):
    """The error for a mesh that does not cover its devices, or does not divide a batch or array."""


def mesh_shape(config: MeshConfig, n_devices: int) -> dict[str, int]:
    """Computes the number of devices along each axis, and replaces -1.

    Raises:
      DoesNotDivide: the axes do not multiply to `n_devices`.
    """
    shape = dataclasses.asdict(config)
    known = math.prod(size for size in shape.values() if size != -1)
    free = [name for name, size in shape.items() if size == -1]
    if free and n_devices % known == 0:
        shape[free[0]] = n_devices // known
    asked = " x ".join(f"{name}={size}" for name, size in shape.items())
    if math.prod(shape.values()) != n_devices:
        raise DoesNotDivide(
            f"the mesh {asked} does not cover {n_devices} devices; "
            f"their product must be {n_devices} (one axis may be -1 to take the rest)"
        )
    return shape


def device_kind() -> str:
    """Returns JAX's name of the mesh's devices; they may belong to a machine you do not have."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.devices()[0].device_kind if device is None else device.device_kind


def platform() -> str:
    """Returns `cpu`, `gpu` or `tpu`, the platform of `device_kind`."""
    if getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) is None:
        return jax.default_backend()
    kind = device_kind().lower()
    return "tpu" if "tpu" in kind else "cpu" if kind == "cpu" else "gpu"


def make_mesh(
    config: MeshConfig,
    dcn: DcnConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
    """Arranges devices in a mesh so that neighbours on an axis are neighbours in the network.

    Args:
      config: devices along each axis within one slice (fast network, ICI).
      dcn: slices along each axis (data-centre network); default: one slice.
      devices: all devices of the job; default: `jax.devices()`.

    Returns:
      A mesh with the axes `AXES`, all `AxisType.Auto`; axis sizes are the products of both factors.

    Raises:
      DoesNotDivide: the sizes do not multiply to the number of devices.
      UserError: `dcn` needs more or fewer slices than there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    dcn_sizes = dataclasses.asdict(dcn or DcnConfig())
    n_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if -1 in dcn_sizes.values():
        dcn_sizes = mesh_shape(dcn or DcnConfig(), n_slices)
    n_groups = math.prod(dcn_sizes.values())
    if len(devices) % n_groups:
        raise DoesNotDivide(f"{len(devices)} devices do not divide into dcn groups {dcn_sizes}")
    ici_sizes = mesh_shape(config, len(devices) // n_groups)
    ici, outer = tuple(ici_sizes.values()), tuple(dcn_sizes.values())
    if n_groups == 1:
        array = mesh_utils.create_device_mesh(ici, devices, allow_split_physical_axes=True)
    elif n_slices == n_groups:
        array = mesh_utils.create_hybrid_device_mesh(
            ici, outer, devices, allow_split_physical_axes=True
        )
    elif n_slices == 1:
        # Groups of hosts (GPU nodes, fake devices) in one slice: JAX lists devices host by host,
        # so each group is a contiguous block.
        blocks = np.asarray(devices, dtype=object).reshape(*outer, *ici)
        order = [axis for pair in zip(range(4), range(4, 8), strict=True) for axis in pair]
        shape = [o * i for o, i in zip(outer, ici, strict=True)]
        array = blocks.transpose(order).reshape(shape)
    else:
        raise UserError(f"dcn {dcn_sizes} needs {n_groups} slices, but there are {n_slices}")
    return jax.sharding.Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> jax.sharding.Mesh:
    """Makes the mesh of a text such as `fsdp=2,tensor=4`; other axes have size 1.

    The size -1 takes the remaining devices.

    Raises:
      UserError: the text has another form, or there are too few devices.
    """
    sizes = dict.fromkeys(AXES, 1)
    for item in text.split(","):
        name, _, size = item.strip().partition("=")
        if name not in sizes or not size.removeprefix("-").isdigit():
            raise UserError(
                f"--mesh: {item.strip()!r} is not AXIS=DEVICES with an axis of {', '.join(AXES)}; "
                "try --mesh=fsdp=2,tensor=2"
            )
        sizes[name] = int(size)
    if sizes["context"] != 1:
        raise UserError("--mesh: context is for training; use data, fsdp and tensor here")
    config, devices = MeshConfig(**sizes), jax.devices()
    if -1 not in sizes.values() and math.prod(sizes.values()) < len(devices):
        devices = devices[: math.prod(sizes.values())]
    mesh_shape(config, len(devices))
    return make_mesh(config, devices=devices)
