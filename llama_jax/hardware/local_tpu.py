"""The TPU of this computer, found before JAX loads libtpu, which reads its flags at that time."""

import glob
import importlib.metadata
import os
from collections.abc import Mapping

# Google's chips on the PCI bus, as in JAX's jax/_src/hardware_utils.py.
_VENDOR = "0x1ae0"
_CHIPS = {
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "tpu7x",
}


def tpu_here(env: Mapping[str, str] = os.environ, bus: str = "/sys/bus/pci/devices") -> str:
    """Returns the TPU that JAX will run on, by its name in `chips`; "" if it will not use a TPU.

    Reads the PCI bus, as JAX does; if it shows no TPU, TPU_ACCELERATOR_TYPE, which Google Cloud
    sets (`v5litepod-16`).

    Args:
      env: the environment variables.
      bus: a folder with one folder per PCI device.
    """
    if env.get("JAX_PLATFORMS", "").split(",")[0] not in ("", "tpu"):
        return ""
    if not os.path.isfile(env.get("TPU_LIBRARY_PATH", "")) and not libtpu_version():
        return ""  # without the library JAX does not see the chips
    for folder in sorted(glob.glob(f"{glob.escape(bus)}/*")):
        chip = _CHIPS.get(_text(f"{folder}/device"))
        if chip and _text(f"{folder}/vendor") == _VENDOR:
            return chip
    kind = env.get("TPU_ACCELERATOR_TYPE", "").split("-")[0]
    return {"v5litepod": "v5e"}.get(kind, kind)


def libtpu_version() -> str:
    """Returns the version of the installed libtpu, such as `0.0.42.1`; "" if it is missing."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _text(path: str) -> str:
    """Reads a small file; returns "" if it cannot be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
