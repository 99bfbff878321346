"""Inputs for the tests of the CPU kernels, at odd addresses, and how far their sums may err."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps


def unaligned(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Random values that begin one element past an aligned address, NaN before and after."""
    count = int(torch.Size(shape).numel())
    memory = torch.full((count + 2,), torch.nan).to(dtype)
    memory[1:-1] = (torch.randn(count) * scale).to(dtype)
    return memory[1:-1].view(shape)


def sum_bound(x: Tensor, weight: Tensor) -> Tensor:
    """How far an fp32 sum of K products in any order may be from the exact one: K eps |x| |w|."""
    return (x.double().abs() @ weight.double().abs().t()) * (x.shape[-1] + 2) * EPS + 1e-30
