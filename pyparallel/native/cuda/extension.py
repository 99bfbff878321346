"""Loading of the CUDA extension, and what is missing where it cannot be used.

The extension (`make cuda`) builds on any machine with nvcc, and loads, with its op schemas, on any
machine with NCCL's library; running its kernels needs a GPU and a CUDA build of torch.
"""

from __future__ import annotations

import ctypes
import importlib
import shutil
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from pyparallel.native.cuda.tuning import tuning

NAME = "pyparallel._cuda"
NCCL_LIBRARY = "libnccl.so.2"
# As numbered by ncclDataType_t; what is not summed may also travel as bytes.
NCCL_TYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
NCCL_REDUCTIONS = {"sum": 0, "max": 2, "min": 3}
BYTES = 1


def is_built() -> bool:
    """Whether the shared library lies beside this file."""
    return find_spec(NAME) is not None


@lru_cache(maxsize=1)
def load() -> ModuleType:
    """The extension; loading it registers its ops in `torch.ops.pyparallel`.

    Raises:
        RuntimeError: not built, or NCCL's library is not found; the message says what to do.
    """
    if not is_built():
        raise RuntimeError("the CUDA extension is not built; run `make cuda` where nvcc is")
    _load_nccl()
    try:
        return importlib.import_module(NAME)
    except ImportError as error:
        raise RuntimeError(
            f"the CUDA extension does not load beside torch {torch.__version__}: {error}; "
            f"run `make cuda` again"
        ) from error


def _load_nccl() -> None:
    # A CUDA build of torch has loaded its NCCL already: then the name resolves to that one.
    errors = []
    for path in (NCCL_LIBRARY, *_nccl_wheel()):
        try:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            return
        except OSError as error:
            errors.append(str(error))
    raise RuntimeError(f"NCCL is not found ({errors[0]}); pip install --no-deps nvidia-nccl-cu13")


def _nccl_wheel() -> list[Path]:
    try:
        spec = find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return []
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    return [Path(folder) / "lib" / NCCL_LIBRARY for folder in folders]


def missing() -> list[str]:
    """Reasons why the CUDA backend cannot run here, most basic first; empty where it can."""
    reasons = []
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} is built without CUDA")
    try:
        extension = load()
        if extension.device_count() == 0:
            reasons.append("no CUDA device")
    except RuntimeError as error:
        reasons.append(str(error))
        if not is_built() and shutil.which("nvcc") is None:
            reasons.append("nvcc is not on the PATH, so it cannot be built here")
    return reasons


def describe() -> dict[str, object]:
    """What `pyparallel doctor` prints of this backend."""
    facts: dict[str, object] = {"built": is_built(), "nvcc": shutil.which("nvcc") is not None}
    if is_built():
        try:
            extension = load()
            version = extension.nccl_version()
            major, minor, patch = version // 10000, version % 10000 // 100, version % 100
            facts["nccl"] = f"{major}.{minor}.{patch}"
            facts["architectures"] = extension.architectures().split()
            facts["devices"] = extension.device_count()
        except RuntimeError as error:
            facts["error"] = str(error)
    facts["missing"] = missing()
    try:
        facts["thresholds"] = tuning().source
    except ValueError as error:
        facts["thresholds"] = str(error)
    return facts


class _Memory:
    """Memory of the extension, as `torch.as_tensor` takes it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def tensor_at(address: int, num_bytes: int) -> Tensor:
    """uint8 [num_bytes] on the current device over memory whose owner outlives the tensor."""
    return torch.as_tensor(_Memory(address, num_bytes), device="cuda")


def stream() -> int:
    """The current stream, as the extension takes it."""
    return torch.cuda.current_stream().cuda_stream


def type_of(tensor: Tensor) -> tuple[int, int]:
    """NCCL's type and how many of it an element is: bytes where NCCL lacks the type."""
    if tensor.dtype in NCCL_TYPES:
        return NCCL_TYPES[tensor.dtype], 1
    return BYTES, tensor.element_size()
