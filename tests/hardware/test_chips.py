import types

import pytest

from llama_jax.hardware.chips import peak_flops, peak_name


def device(kind):
    return types.SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", 989e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("TPU v9", None),
    ],
)
def test_peaks_are_known_or_none(kind, peak):
    assert peak_flops(device(kind)) == peak


def test_the_peak_has_a_name_and_a_value():
    assert peak_name(device("NVIDIA H200")) == "NVIDIA H200 989 TFLOP/s"
    assert peak_name(device("TPU v5 lite")) == "TPU v5 lite 197 TFLOP/s"
    assert peak_name(device("cpu")) == "cpu"
