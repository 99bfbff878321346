"""Rotary position embedding (Su et al., 2021, RoFormer, section 3.2.2).

    y_i = x_i cos - x_j sin,   y_j = x_j cos + x_i sin

over pairs (i, j) of the first 2E features of x [B, S, N, D]: j = i + E, or neighbours
(2i, 2i + 1) where interleaved. cos, sin [positions, E]; token t of a sequence reads row
positions[b, t], or row t where no positions are given. The other features pass through.
The gradient is the same rotation with -sin (inverse=True).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pyparallel.kernels.configurations import elementwise_config
from pyparallel.kernels.language import narrow
from pyparallel.kernels.launch import (
    FLOATS,
    architecture,
    cdiv,
    check_dtype,
    check_last_contiguous,
    check_runnable,
    check_shape,
    next_power_of_two,
)


@triton.jit
def rope_kernel(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, out_ptr, S, N, D,
    stride_xb, stride_xs, stride_xn, stride_ob, stride_os, stride_on, stride_c, stride_pb,
    E: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, COPY_REST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_REST: tl.constexpr,
):
    """Grid (B * S, tiles of heads)."""
    token = tl.program_id(0)
    b = (token // S).to(tl.int64)
    s = token % S
    heads = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + b * stride_pb + s).to(tl.int64)
    else:
        position = s.to(tl.int64)
    cos = tl.load(cos_ptr + position * stride_c + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + position * stride_c + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    x_row = x_ptr + b * stride_xb + s.to(tl.int64) * stride_xs + heads[:, None] * stride_xn
    out_row = out_ptr + b * stride_ob + s.to(tl.int64) * stride_os + heads[:, None] * stride_on
    n_ok = (heads < N)[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_E)[None, :]
        mask = n_ok & (both < 2 * E)
        pairs = tl.load(x_row + both, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(pairs, (BLOCK_N, BLOCK_E, 2)))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        turned = tl.reshape(turned, (BLOCK_N, 2 * BLOCK_E))
        tl.store(out_row + both, narrow(turned, dtype), mask=mask)
    else:
        mask = n_ok & (e < E)[None, :]
        first = tl.load(x_row + e[None, :], mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_row + E + e[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out_row + e[None, :], narrow(first * cos - second * sin, dtype), mask=mask)
        tl.store(out_row + E + e[None, :], narrow(second * cos + first * sin, dtype), mask=mask)
    if COPY_REST:
        rest = 2 * E + tl.arange(0, BLOCK_REST)[None, :]
        mask = n_ok & (rest < D)
        tl.store(out_row + rest, tl.load(x_row + rest, mask=mask, other=0.0), mask=mask)


def rope_out(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, *,
    positions: torch.Tensor | None = None, interleaved: bool = False, inverse: bool = False,
) -> torch.Tensor:
    """Rotate x [B, S, N, D] into out, which may be x itself."""
    check_runnable("rope", x, cos, sin, out, positions)
    check_dtype("x", x, FLOATS)
    if x.dim() != 4 or cos.dim() != 2 or 2 * cos.shape[1] > x.shape[3]:
        raise ValueError(
            f"rope: expected x [B, S, N, D] and cos [positions, E] with 2E <= D, got "
            f"{tuple(x.shape)} and {tuple(cos.shape)}"
        )
    check_shape("out", out, tuple(x.shape))
    check_shape("sin", sin, tuple(cos.shape))
    for name, tensor in (("x", x), ("out", out), ("cos", cos), ("sin", sin)):
        check_last_contiguous(name, tensor)
    if cos.stride(0) != sin.stride(0):
        raise ValueError("sin: expected the strides of cos; call .contiguous() on both")
    b, s, n, d = x.shape
    if positions is not None:
        check_shape("positions", positions, (b, s))
        check_last_contiguous("positions", positions)
    elif cos.shape[0] < s:
        raise ValueError(f"cos: expected at least {s} positions, got {cos.shape[0]}; extend it")
    if x.numel() == 0:
        return out
    half = cos.shape[1]
    rest = d - 2 * half
    block_e = next_power_of_two(half)
    # Of each half of the rotated features.
    config = elementwise_config(architecture(x), "stream")
    block_n = min(next_power_of_two(n), max(1, config.block // block_e))
    rope_kernel[b * s, cdiv(n, block_n)](
        x, cos, sin, positions, out, s, n, d, x.stride(0), x.stride(1), x.stride(2),
        out.stride(0), out.stride(1), out.stride(2), cos.stride(0),
        positions.stride(0) if positions is not None else 0,
        E=half, INVERSE=inverse, INTERLEAVED=interleaved, HAS_POSITIONS=positions is not None,
        COPY_REST=rest > 0 and out.data_ptr() != x.data_ptr(),
        BLOCK_N=block_n, BLOCK_E=block_e, BLOCK_REST=next_power_of_two(max(rest, 1)),
        num_warps=config.num_warps,
    )
    return out


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *,
    positions: torch.Tensor | None = None, interleaved: bool = False, inverse: bool = False,
) -> torch.Tensor:
    """The rotated x [B, S, N, D] as a new tensor."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return rope_out(
        x, cos, sin, out, positions=positions, interleaved=interleaved, inverse=inverse
    )
