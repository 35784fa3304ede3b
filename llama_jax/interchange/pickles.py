"""Pickles of torch (`.pth`, `.bin`): named tensors that are mapped into memory, and never code.

A pickle may call any function when it is loaded. `torch.load(weights_only=True)` makes tensors and
containers of them only, and fails where a file asks for anything else. Needs torch
(`pip install '.[meta]'`).
"""

import dataclasses
import re
import warnings
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from llama_jax.errors import UserError, first_line
from llama_jax.files import is_object_store, refuse_lfs_pointer
from llama_jax.interchange.safetensors import DTYPES, shown

_OLDEST = (2, 6)  # before it, weights_only could be made to run code (CVE-2025-32434)
_ZIP = b"PK\x03\x04"


def import_torch() -> Any:
    """The module torch.

    Raises:
      UserError: it is not installed, or its `weights_only` is not safe.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError("pickles (.pth, .bin) need torch: pip install '.[meta]'") from error
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < _OLDEST:
        raise UserError(f"pickles (.pth, .bin) need torch 2.6 or newer, not {torch.__version__}")
    return torch


def to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as NumPy, which shares its memory; torch knows no NumPy bfloat16."""
    torch = import_torch()
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def load(file: epath.Path) -> dict[str, Any]:
    """Name -> torch tensor, for all tensors of a pickle.

    A file of the zip format (torch 1.6 and newer) is mapped into memory; an older one is read.

    Raises:
      UserError: torch is missing; the file cannot be read, is damaged, or holds anything but named
        tensors.
    """
    torch = import_torch()
    if is_object_store(file):
        raise UserError(f"{file}: torch reads pickles from a disk only; copy the folder to one")
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
        refuse_lfs_pointer(head, str(file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the format's age
            mapped = {"mmap": True} if head.startswith(_ZIP) else {}
            found = torch.load(str(file), map_location="cpu", weights_only=True, **mapped)
    except UserError:
        raise
    except Exception as error:  # torch raises whatever the damaged bytes lead it to
        reason = _reason(error)
        raise UserError(f"{file} is not a file of weights, or damaged: {reason}") from error
    if not isinstance(found, dict) or not found:
        raise UserError(f"{file} is not a file of weights: it holds no named tensors")
    if not all(isinstance(name, str) and _is_dense(tensor) for name, tensor in found.items()):
        raise UserError(f"{file} is not a file of weights: it holds other things, too")
    return found


def _is_dense(tensor: Any) -> bool:
    """Whether it is an array with numbers: not sparse, not quantised, not without memory."""
    torch = import_torch()
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_neg()
    )


def _reason(error: Exception) -> str:
    """Why a file was not loaded, without torch's advice to load it with its code."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"it asks for {shown(code[1])}, which is more than tensors and could run code"
    if isinstance(error, OSError | RuntimeError) and not isinstance(error, RecursionError):
        return shown(first_line(error))
    return "it is no pickle of tensors"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file, as `safetensors.Entry`."""

    file: epath.Path
    dtype: Any
    shape: tuple[int, ...]
    tensor: Any

    def rows(self, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or a range of its rows; a copy."""
        array = to_numpy(self.tensor)
        return np.array(array[rows] if self.shape else array, order="C")


def read_tensors(file: epath.Path) -> dict[str, Entry]:
    """Name -> tensor, for all tensors of a pickle.

    Raises:
      UserError: as `load`, or a tensor has another dtype than bfloat16, float16 and float32.
    """
    found = {}
    for name, tensor in load(file).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in map(str, DTYPES.values()):
            known = ", ".join(map(str, DTYPES.values()))
            raise UserError(f"{file}: {shown(name)} has dtype {dtype}; not {known}")
        found[name] = Entry(file, np.dtype(dtype), tuple(tensor.shape), tensor)
    return found
