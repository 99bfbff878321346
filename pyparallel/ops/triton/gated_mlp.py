"""The gated half of an MLP: gate and up in one pass over x.

Legend: K input features, F_r of this rank's intermediate features; weight [2 F_r, K] = [gate rows, up
rows]. x is replicated.

    forward   gate, up = x w_gate^T, x w_up^T;   y[..., F_r] = act(gate) * up
    backward  dgate = dy * up * act'(gate),  dup = dy * act(gate)
              dx = all_reduce([dgate, dup] w),   dw = [dgate, dup]^T x

A fused way of ``column_parallel_linear`` and ``gated_activation``, with their bits; gate and up are
written only where a gradient will want them. Communication: none forward, one all-reduce backward.
Source: Shazeer 2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pyparallel import backend
from pyparallel.comm.group import Group
from pyparallel.kernels.elementwise.gated_activation import gated_activation_backward_out
from pyparallel.kernels.matmul.gated_mlp_descriptor import gated_mlp_on_best_path
from pyparallel.native import FLOATS
from pyparallel.ops.column_parallel_linear import column_parallel_linear_backward
from pyparallel.ops.linear import rows


def reason(x: Tensor, weight: Tensor, kind: str, group: Group) -> str | None:
    """Why a call can't, or should not, run here."""
    if backend.chosen() != "triton":
        return "matmuls are left to torch unless triton is asked for"
    if weight.dtype not in FLOATS or weight.dtype != x.dtype:
        return f"expected one float dtype, got {x.dtype} and {weight.dtype}"
    return None


def _forward(x: Tensor, weight: Tensor, kind: str, gate_up: Tensor | None) -> Tensor:
    flat = rows(x)
    out = x.new_empty(flat.shape[0], weight.shape[0] // 2)
    return gated_mlp_on_best_path(flat, weight, out, activation=kind, gate_up=gate_up)


class _GatedMLP(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, kind: str, group: Group) -> Tensor:
        gate_up = None
        if any(ctx.needs_input_grad):
            gate_up = x.new_empty(rows(x).shape[0], weight.shape[0])
        y = _forward(x, weight, kind, gate_up)
        ctx.save_for_backward(x, weight, gate_up)
        ctx.options = kind, group
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, gate_up = ctx.saved_tensors
        kind, group = ctx.options
        both = gate_up.new_empty(gate_up.shape)
        pairs = (*gate_up.chunk(2, -1), *both.chunk(2, -1))
        dy = rows(grad).contiguous()
        gated_activation_backward_out(dy, *pairs, activation=kind)
        both = both.view(*x.shape[:-1], both.shape[-1])
        needs = ctx.needs_input_grad[:2]
        return *column_parallel_linear_backward(both, x, weight, group, needs), None, None


def run(x: Tensor, weight: Tensor, kind: str, group: Group) -> Tensor:
    """``act(x w_gate^T) * (x w_up^T)``; see the module's equations. Differentiable.

    Args:
        x: [..., K], replicated. weight: [2 F_r, K]. kind: of :data:`pyparallel.reference.GATES`.
    """
    return _GatedMLP.apply(x, weight, kind, group)
