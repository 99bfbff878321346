"""``dropout`` on the CPU: the generator's counters run beside the elements, in SIMD."""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel import _C

# As numbered by DType in csrc/cpu/world/types.h.
DTYPES = {torch.float16: 6, torch.bfloat16: 7, torch.float32: 8}


def reason(x: Tensor, p: float, seed: Tensor, rows: int, row_start: int) -> str | None:
    """Why a call can't run here, or None."""
    return None if x.dtype in DTYPES else f"the kernel takes no {x.dtype}"


def run(x: Tensor, p: float, seed: Tensor, rows: int, row_start: int) -> Tensor:
    """See :func:`pyparallel.ops.dropout.run_torch`. No autograd."""
    y = torch.empty(x.shape, dtype=x.dtype)
    source, key, width = x.contiguous(), int(seed) % (1 << 64), x.shape[-1]
    held = x.shape[-2] * width
    for sequence in range(x.numel() // held if held else 0):
        offset = sequence * held * x.itemsize
        _C.cpu_dropout(
            source.data_ptr() + offset,
            y.data_ptr() + offset,
            DTYPES[x.dtype],
            held,
            (sequence * rows + row_start) * width,
            key,
            round((1.0 - p) * 2.0**32),
            1.0 / (1.0 - p),
        )
    return y
