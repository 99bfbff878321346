"""The types and reductions that the shared-memory engine takes, as it numbers them."""

from __future__ import annotations

import torch

from pyparallel.comm.checks import REDUCTIONS

# As numbered by DType in csrc/cpu/world/types.h.
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
REDUCTION_CODES = {name: code for code, name in enumerate(REDUCTIONS, start=1)}
