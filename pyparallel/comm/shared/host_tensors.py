"""What the shared-memory engine takes: contiguous CPU tensors of the types it numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel.comm.communicator import REDUCTIONS

# As numbered by DType in csrc/cpu/world_types.h.
DTYPES = (
    torch.uint8,
    torch.int8,
    torch.bool,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
REDUCIBLE = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int32,
    torch.int64,
)
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
REDUCIBLE_CODES = {dtype: CODES[dtype] for dtype in REDUCIBLE}
_REDUCTION_CODES = {name: code for code, name in enumerate(REDUCTIONS, start=1)}


def check_place(tensor: Tensor, name: str) -> None:
    """Raise ValueError unless the engine can take the tensor's memory as it is."""
    if not tensor.is_cpu:
        raise ValueError(f"{name}: expected a CPU tensor, got one on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; pass {name}.contiguous()"
        )
    if tensor.is_neg() or tensor.is_conj():
        raise ValueError(
            f"{name}: expected resolved values; pass {name}.resolve_neg().resolve_conj()"
        )


def exchange_code(tensor: Tensor, name: str) -> int:
    """The number of the tensor's type, for calls that move data."""
    check_place(tensor, name)
    code = CODES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"{name}: {tensor.dtype} cannot be exchanged; view it as torch.uint8")
    return code


def reducible_code(tensor: Tensor, name: str) -> int:
    """The number of the tensor's type, for calls that reduce."""
    check_place(tensor, name)
    code = REDUCIBLE_CODES.get(tensor.dtype)
    if code is None:
        raise ValueError(
            f"{name}: expected one of {', '.join(str(d) for d in REDUCIBLE)} for a reduction, "
            f"got {tensor.dtype}; convert it first"
        )
    return code


def reduction_code(op: str) -> int:
    """The number of a reduction."""
    code = _REDUCTION_CODES.get(op)
    if code is None:
        raise ValueError(f"op: expected one of {', '.join(REDUCTIONS)}, got {op!r}")
    return code


def check_pair(output: Tensor, input: Tensor) -> None:
    """Raise ValueError unless both can be taken and are of one type."""
    check_place(output, "output")
    check_place(input, "input")
    if input.dtype != output.dtype:
        raise ValueError(f"input: expected output's dtype {output.dtype}, got {input.dtype}")
