"""SwiGLU, GeGLU and their kin, and plain activations (Shazeer, 2020, GLU variants).

    forward:   out = act(gate) * up
    backward:  dgate = dout * up * act'(gate),   dup = dout * act(gate)

gate, up, out [..., F]; gate and up may be the halves of one [..., 2F] tensor, and so may
dgate and dup. Without up: out = act(gate), dgate = dout * act'(gate).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyparallel.kernels.configurations import elementwise_config
from pyparallel.kernels.language import ACTIVATIONS, activate, activation_slope, narrow
from pyparallel.kernels.launch import (
    FLOATS,
    architecture,
    as_rows,
    cdiv,
    check_dtype,
    check_runnable,
    check_shape,
)


@triton.jit
def gated_activation_kernel(
    gate_ptr, up_ptr, out_ptr, F, stride_gm, stride_um, stride_om,
    ACTIVATION: tl.constexpr, HAS_UP: tl.constexpr, BLOCK_F: tl.constexpr,
):
    """Grid (rows, tiles of F)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = cols < F
    gate = tl.load(gate_ptr + row * stride_gm + cols, mask=mask, other=0.0).to(tl.float32)
    out = activate(gate, ACTIVATION)
    if HAS_UP:
        out *= tl.load(up_ptr + row * stride_um + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_om + cols, narrow(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_activation_backward_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, F,
    stride_dm, stride_gm, stride_um, stride_dgm, stride_dum,
    ACTIVATION: tl.constexpr, HAS_UP: tl.constexpr, BLOCK_F: tl.constexpr,
):
    """Grid (rows, tiles of F)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = cols < F
    dout = tl.load(dout_ptr + row * stride_dm + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gm + cols, mask=mask, other=0.0).to(tl.float32)
    dgate = dout * activation_slope(gate, ACTIVATION)
    if HAS_UP:
        up = tl.load(up_ptr + row * stride_um + cols, mask=mask, other=0.0).to(tl.float32)
        dup = dout * activate(gate, ACTIVATION)
        dgate *= up
        dup_ptrs = dup_ptr + row * stride_dum + cols
        tl.store(dup_ptrs, narrow(dup, dup_ptr.dtype.element_ty), mask=mask)
    dgate_ptrs = dgate_ptr + row * stride_dgm + cols
    tl.store(dgate_ptrs, narrow(dgate, dgate_ptr.dtype.element_ty), mask=mask)


def _rows(named: dict[str, torch.Tensor | None], activation: str) -> list[torch.Tensor | None]:
    gate = named["gate"]
    assert gate is not None
    check_runnable("gated_activation", *named.values())
    check_dtype("gate", gate, FLOATS)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    for name, tensor in named.items():
        if tensor is not None:
            check_shape(name, tensor, tuple(gate.shape))
    return [t if t is None else as_rows(name, t) for name, t in named.items()]


def _stride(tensor: torch.Tensor | None) -> int:
    return tensor.stride(0) if tensor is not None else 0


def gated_activation_out(
    gate: torch.Tensor, up: torch.Tensor | None, out: torch.Tensor, *, activation: str
) -> torch.Tensor:
    """Write act(gate) * up into out."""
    g, u, o = _rows({"gate": gate, "up": up, "out": out}, activation)
    if gate.numel():
        config = elementwise_config(architecture(gate), "stream")
        gated_activation_kernel[g.shape[0], cdiv(g.shape[1], config.block)](
            g, u, o, g.shape[1], _stride(g), _stride(u), _stride(o), ACTIVATION=activation,
            HAS_UP=up is not None, BLOCK_F=config.block, num_warps=config.num_warps,
        )
    return out


def gated_activation(
    gate: torch.Tensor, up: torch.Tensor | None, *, activation: str
) -> torch.Tensor:
    """act(gate) * up as a new tensor."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return gated_activation_out(gate, up, out, activation=activation)


def gated_activation_backward_out(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None,
    dgate: torch.Tensor, dup: torch.Tensor | None, *, activation: str,
) -> None:
    """Write the gradients; dgate may be gate and dup may be up (in place)."""
    if (up is None) != (dup is None):
        raise ValueError("dup: expected exactly where up is given; pass both or neither")
    named = {"gate": gate, "dout": dout, "up": up, "dgate": dgate, "dup": dup}
    g, d, u, dg, du = _rows(named, activation)
    if gate.numel():
        config = elementwise_config(architecture(gate), "stream")
        gated_activation_backward_kernel[g.shape[0], cdiv(g.shape[1], config.block)](
            d, g, u, dg, du, g.shape[1], _stride(d), _stride(g), _stride(u), _stride(dg),
            _stride(du), ACTIVATION=activation, HAS_UP=up is not None, BLOCK_F=config.block,
            num_warps=config.num_warps,
        )


def gated_activation_backward(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, *, activation: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(dgate, dup); where up is given both are halves of one [..., 2F] tensor."""
    width = gate.shape[-1]
    shape = (*gate.shape[:-1], width if up is None else 2 * width)
    both = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    dgate = both[..., :width]
    dup = both[..., width:] if up is not None else None
    gated_activation_backward_out(dout, gate, up, dgate, dup, activation=activation)
    return dgate, dup
