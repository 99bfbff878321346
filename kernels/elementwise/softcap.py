"""Soft-capping of scores and logits (Gemma Team, 2024, Gemma 2, section 2).

    forward:   y = cap * tanh(x / cap)
    backward:  dx = dy * (1 - tanh(x / cap)^2)

x, y, dy, dx of any shape, contiguous; fp32 inside, rounded once. Infinities give +-cap and a
gradient of 0, NaN gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from pyparallel.kernels.configurations import elementwise_config
from pyparallel.kernels.language import narrow, tanh
from pyparallel.kernels.launch import (
    FLOATS,
    architecture,
    cdiv,
    check_dtype,
    check_runnable,
    check_shape,
)


@triton.jit
def _capped(x, cap):
    """tanh(x / cap), also where |x / cap| is so small that 1 - 2 / (e^(2 x / cap) + 1) cancels."""
    z = x / cap
    # The next term of the series, 2 z^5 / 15, is below half a rounding of z here.
    return tl.where(tl.abs(z) < 0.0214, z - z * z * z / 3.0, tanh(z))


@triton.jit
def softcap_kernel(x_ptr, y_ptr, num_elements, cap, BLOCK: tl.constexpr):
    """Grid (tiles of the elements)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_elements
    x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    y = cap * _capped(x, cap)
    tl.store(y_ptr + index, narrow(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def softcap_backward_kernel(dy_ptr, x_ptr, dx_ptr, num_elements, cap, BLOCK: tl.constexpr):
    """Grid (tiles of the elements)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < num_elements
    x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + index, mask=mask, other=0.0).to(tl.float32)
    t = _capped(x, cap)
    dx = dy * ((1.0 - t) * (1.0 + t))
    tl.store(dx_ptr + index, narrow(dx, dx_ptr.dtype.element_ty), mask=mask)


def _check(named: dict[str, torch.Tensor], cap: float) -> None:
    x = named["x"]
    check_runnable("softcap", *named.values())
    check_dtype("x", x, FLOATS)
    if not cap > 0.0:
        raise ValueError(f"cap: expected more than 0, got {cap}")
    for name, tensor in named.items():
        check_shape(name, tensor, tuple(x.shape))
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected contiguous, got strides {tensor.stride()}; copy it")


def softcap_out(x: torch.Tensor, y: torch.Tensor, *, cap: float) -> torch.Tensor:
    """Write cap * tanh(x / cap) into y, which may be x."""
    _check({"x": x, "y": y}, cap)
    if x.numel():
        config = elementwise_config(architecture(x), "stream")
        softcap_kernel[(cdiv(x.numel(), config.block),)](
            x, y, x.numel(), cap, BLOCK=config.block, num_warps=config.num_warps
        )
    return y


def softcap(x: torch.Tensor, *, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap) as a new tensor."""
    return softcap_out(x, torch.empty(x.shape, dtype=x.dtype, device=x.device), cap=cap)


def softcap_backward(dy: torch.Tensor, x: torch.Tensor, *, cap: float) -> torch.Tensor:
    """dx of y = softcap(x)."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _check({"x": x, "dy": dy, "dx": dx}, cap)
    if x.numel():
        config = elementwise_config(architecture(x), "stream")
        softcap_backward_kernel[(cdiv(x.numel(), config.block),)](
            dy, x, dx, x.numel(), cap, BLOCK=config.block, num_warps=config.num_warps
        )
    return dx


def compile_cases(arch: str) -> Iterator[Any]:
    """Both kernels as they are launched, for `pyparallel kernels`."""
    from pyparallel.kernels.report.compile_kernel import Case

    stream = elementwise_config(arch, "stream")
    for kernel in (softcap_kernel, softcap_backward_kernel):
        pointers = {name: "bf16" for name in kernel.arg_names if name.endswith("_ptr")}
        yield Case(
            kernel.__name__.removesuffix("_kernel"), "bf16", kernel, pointers,
            {"BLOCK": stream.block}, stream.num_warps, floats=("cap",),
        )
