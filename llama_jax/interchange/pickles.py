"""Reads torch pickles (`.pth`, `.bin`): maps named tensors into memory, and never runs code.

A pickle may call any function when it is loaded. `torch.load(weights_only=True)` creates only
tensors and containers of them, and fails if a file asks for anything else. Needs torch
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

_OLDEST = (2, 6)  # in older versions, weights_only could run code (CVE-2025-32434)
_ZIP = b"PK\x03\x04"


def import_torch() -> Any:
    """Imports torch, and returns the module.

    Raises:
      UserError: torch is not installed, or its `weights_only` is not safe.
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
    """Returns a NumPy array that shares memory with a torch tensor, also for bfloat16."""
    torch = import_torch()
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def load(file: epath.Path) -> dict[str, Any]:
    """Loads all tensors of a pickle, by name.

    A file in zip format (torch 1.6 and newer) is mapped into memory; an older one is read.

    Raises:
      UserError: torch is missing; the file cannot be read, is damaged, or holds anything but named
        tensors.
    """
    torch = import_torch()
    if is_object_store(file):
        raise UserError(f"{file}: torch reads pickles only from a disk; copy the folder to a disk")
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
        refuse_lfs_pointer(head, str(file))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an old format
            mapped = {"mmap": True} if head.startswith(_ZIP) else {}
            found = torch.load(str(file), map_location="cpu", weights_only=True, **mapped)
    except UserError:
        raise
    except Exception as error:  # with damaged bytes, torch may raise anything
        reason = _reason(error)
        raise UserError(f"{file} is not a file of weights, or damaged: {reason}") from error
    if not isinstance(found, dict) or not found:
        raise UserError(f"{file} is not a file of weights: it holds no named tensors")
    if not all(isinstance(name, str) and _is_dense(tensor) for name, tensor in found.items()):
        raise UserError(f"{file} is not a file of weights: it holds more than named tensors")
    return found


def _is_dense(tensor: Any) -> bool:
    """Returns whether `tensor` is a plain array on the CPU: dense, and not quantised."""
    torch = import_torch()
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_neg()
    )


def _reason(error: Exception) -> str:
    """Returns why a file was not loaded, without torch's advice to load it unsafely."""
    code = re.search(r"GLOBAL (\S+)", str(error))
    if code:
        return f"it asks for {shown(code[1])}, which is not a tensor and could run code"
    if isinstance(error, OSError | RuntimeError) and not isinstance(error, RecursionError):
        return shown(first_line(error))
    return "it is not a pickle of tensors"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file, with the interface of `safetensors.Entry`."""

    file: epath.Path
    dtype: Any
    shape: tuple[int, ...]
    tensor: Any

    def rows(self, rows: slice = slice(None)) -> np.ndarray:
        """Returns a copy of the tensor, or of a range of its rows."""
        array = to_numpy(self.tensor)
        return np.array(array[rows] if self.shape else array, order="C")


def read_tensors(file: epath.Path) -> dict[str, Entry]:
    """Opens all tensors of a pickle, by name.

    Raises:
      UserError: see `load`; a tensor has another dtype than bfloat16, float16 and float32.
    """
    found = {}
    for name, tensor in load(file).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in map(str, DTYPES.values()):
            known = ", ".join(map(str, DTYPES.values()))
            raise UserError(f"{file}: {shown(name)} has dtype {dtype}; supported: {known}")
        found[name] = Entry(file, np.dtype(dtype), tuple(tensor.shape), tensor)
    return found
