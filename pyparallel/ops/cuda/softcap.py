"""``softcap`` by the CUDA extension (csrc/cuda: softcap), differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyparallel.native.cuda import extension
from pyparallel.ops.cuda import dtype_reason

extension.load()
_ops = torch.ops.pyparallel


def reason(x: Tensor, cap: float) -> str | None:
    """Why a call can't run here, or None."""
    return dtype_reason(x)


@torch.library.register_fake("pyparallel::cuda_softcap")
def _(x: Tensor, cap: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("pyparallel::cuda_softcap_backward")
def _(dy: Tensor, x: Tensor, cap: float) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    x, ctx.cap = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return _ops.cuda_softcap_backward(dy.contiguous(), x, ctx.cap), None


torch.library.register_autograd("pyparallel::cuda_softcap", _backward, setup_context=_setup)


def run(x: Tensor, cap: float) -> Tensor:
    """``cap tanh(x / cap)``. Differentiable."""
    return _ops.cuda_softcap(x.contiguous(), cap)
