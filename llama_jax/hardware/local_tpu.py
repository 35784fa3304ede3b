"""Which TPU is here, before JAX starts a backend: libtpu reads its flags when it is loaded."""

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
    """The TPU that JAX will run on, as `chips` names it; "" where it will run on none.

    The chips on the PCI bus tell, as they tell JAX itself, else TPU_ACCELERATOR_TYPE, which Google
    Cloud sets (`v5litepod-16`).

    Args:
      env: the environment.
      bus: folder with one folder for each PCI device.
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
    """Of the package that is installed, such as `0.0.42.1`; "" for none."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _text(path: str) -> str:
    """What a small file says; "" where it cannot be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
