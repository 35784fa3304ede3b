import dataclasses

import jax
import numpy as np
import pytest

from llama_jax.config import DcnConfig, MeshConfig
from llama_jax.errors import UserError
from llama_jax.parallel.mesh import AXES, make_mesh, mesh_shape, parse_mesh, platform


def test_all_axes_are_there_and_auto():
    mesh = make_mesh(MeshConfig())
    assert mesh.axis_names == AXES == ("data", "fsdp", "context", "tensor")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((-1, 1, 1, 1), (8, 1, 1, 1)), ((2, -1, 1, 2), (2, 2, 1, 2)), ((1, 2, 4, -1), (1, 2, 4, 1))],
)
def test_minus_one_takes_what_is_left(sizes, expected):
    assert tuple(mesh_shape(MeshConfig(*sizes), 8).values()) == expected


@pytest.mark.parametrize("sizes", [(3, -1, 1, 1), (2, 2, 1, 1), (16, 1, 1, 1)])
def test_axes_that_do_not_cover_the_devices(sizes):
    with pytest.raises(UserError, match="does not cover 8 devices"):
        mesh_shape(MeshConfig(*sizes), 8)


def test_every_device_once():
    mesh = make_mesh(MeshConfig(2, 2, 1, 2))
    assert sorted(device.id for device in mesh.devices.flat) == list(range(8))


def test_dcn_groups_are_blocks_of_neighbouring_devices():
    mesh = make_mesh(MeshConfig(1, 2, 1, 2), DcnConfig(data=2))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    assert sorted(ids[0].flat) == [0, 1, 2, 3]
    assert sorted(ids[1].flat) == [4, 5, 6, 7]


def test_dcn_multiplies_the_axis_that_ici_has_too():
    mesh = make_mesh(MeshConfig(2, 1, 1, 2), DcnConfig(data=2))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert mesh.shape["data"] == 4
    assert sorted(ids[:2].flat) == [0, 1, 2, 3]


@dataclasses.dataclass(frozen=True)
class FakeTpu:
    """A TPU device with only the attributes that are used to arrange a mesh."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    core_on_chip: int = 0

    @property
    def coords(self):
        return (self.id % 4 % 2, self.id % 4 // 2, 0)


def test_slices_of_real_hardware_lie_along_the_dcn_axis():
    devices = [FakeTpu(number, number // 4) for number in range(8)]
    mesh = make_mesh(MeshConfig(1, 4, 1, 1), DcnConfig(data=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert slices.shape == (2, 4, 1, 1)
    assert (slices[0] == 0).all() and (slices[1] == 1).all()


def test_dcn_minus_one_is_the_number_of_slices():
    devices = [FakeTpu(number, number // 4) for number in range(8)]
    mesh = make_mesh(MeshConfig(), DcnConfig(data=-1), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}


def test_dcn_that_does_not_fit():
    with pytest.raises(UserError, match="do not divide into dcn groups"):
        make_mesh(MeshConfig(), DcnConfig(data=3))
    devices = [FakeTpu(number, number // 2) for number in range(8)]
    with pytest.raises(UserError, match="there are 4"):
        make_mesh(MeshConfig(), DcnConfig(data=2), devices)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("tensor=2", (1, 1, 1, 2)),
        ("fsdp=2, tensor=4", (1, 2, 1, 4)),
        ("data=2,fsdp=-1", (2, 4, 1, 1)),
    ],
)
def test_a_mesh_in_words(text, sizes):
    assert tuple(parse_mesh(text).shape.values()) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor", "'tensor' is not AXIS=DEVICES"),
        ("fsdp=2,model=2", "'model=2' is not AXIS=DEVICES"),
        ("tensor=x", "'tensor=x' is not"),
        ("fsdp=16", "does not cover 8 devices"),
        ("context=2", "context is for training"),
        ("tensor=0", "must be positive"),
        ("fsdp=-1,tensor=-1", "only one mesh axis may be -1"),
    ],
)
def test_no_mesh_in_words(text, message):
    with pytest.raises(UserError, match=message):
        parse_mesh(text)


def test_the_platform_is_that_of_the_mesh():
    with jax.set_mesh(make_mesh(MeshConfig(), devices=jax.devices()[:1])):
        assert platform() == "cpu"
    assert platform() == "cpu"
