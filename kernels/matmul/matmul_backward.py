"""Gradients of matmul: out = activation(x @ w^T + bias) + residual.

    dpre = dout * activation'(pre),  pre = x @ w^T + bias
    dx [M, K] = dpre @ w,   dw [N, K] = dpre^T @ x,   dbias [N] = sum over rows of dpre,
    dresidual = dout

Both products are the forward kernel on transposed views: a tile's operands are read along
whichever axis is contiguous. dw may be added to a fp32 buffer in the same kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pyparallel.kernels.elementwise.gated_activation import gated_activation_backward
from pyparallel.kernels.launch import check_shape
from pyparallel.kernels.matmul.matmul import matmul_out
from pyparallel.kernels.matmul.matmul_descriptor import matmul_on_best_path
from pyparallel.kernels.norm.norm_backward import column_sum_out


class MatmulGradients(NamedTuple):
    """dx [M, K], dw [N, K] (accumulate_into, if given), dbias [N]; None where not wanted."""

    dx: torch.Tensor | None
    dw: torch.Tensor | None
    dbias: torch.Tensor | None


def matmul_backward(
    dout: torch.Tensor, x: torch.Tensor, w: torch.Tensor, *,
    pre_activation: torch.Tensor | None = None, activation: str = "none",
    need_dx: bool = True, need_dw: bool = True, need_dbias: bool = False,
    accumulate_into: torch.Tensor | None = None, precision: str = "ieee",
) -> MatmulGradients:
    """Gradients from dout [M, N]; pre_activation [M, N] is what matmul_out stored.

    accumulate_into [N, K] fp32: dw is added to it in fp32, without a rounding between."""
    check_shape("dout", dout, (x.shape[0], w.shape[0]))
    if activation != "none":
        if pre_activation is None:
            raise ValueError(f"pre_activation: expected the tensor that the forward pass stored "
                             f"for {activation}, got None")
        dout, _ = gated_activation_backward(
            dout.contiguous(), pre_activation, None, activation=activation
        )
    dx = matmul_on_best_path(dout, w.T, precision=precision) if need_dx else None
    dw = None
    if need_dw and accumulate_into is not None:
        dw = matmul_out(dout.T, x.T, accumulate_into, residual=accumulate_into,
                        precision=precision)
    elif need_dw:
        dw = matmul_on_best_path(dout.T, x.T, precision=precision)
    dbias = None
    if need_dbias:
        dbias = torch.empty(w.shape[0], dtype=dout.dtype, device=dout.device)
        column_sum_out(dout.contiguous(), dbias)
    return MatmulGradients(dx, dw, dbias)
