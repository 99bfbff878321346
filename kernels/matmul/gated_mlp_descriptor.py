"""out = act(x @ w_gate^T) * (x @ w_up^T) by a persistent kernel that moves tiles with descriptors.

Legend and rounding as in `gated_mlp.py`, whose bits it has; movement as in
`matmul_descriptor.py`. x and w_gate_up with K contiguous, out and gate_up with contiguous rows,
all aligned to 16 bytes, both halves of gate_up too. x is read once for two accumulators of
128 x 128, which do for one tile of x what a matmul's 128 x 256 do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pyparallel.kernels.configurations import MatmulConfig, descriptor_config, descriptors_pay
from pyparallel.kernels.language import activate, dot, grouped_tile, narrow
from pyparallel.kernels.launch import FLOATS, architecture, num_processors
from pyparallel.kernels.matmul.gated_mlp import check_gated, gated_mlp_out
from pyparallel.kernels.matmul.matmul_descriptor import TRITON_TYPES, reason_against_descriptors


@triton.jit
def gated_mlp_descriptor_kernel(
    x_desc, w_gate_desc, w_up_desc, out_desc, gate_desc, up_desc, M, F, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    STORE_GATE_UP: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    dtype: tl.constexpr,
):
    """Grid (programs)."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = grouped_tile(tile, tiles_m, tiles_n, GROUP_M)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            x = x_desc.load([tile_m * BLOCK_M, k * BLOCK_K])
            w_gate = w_gate_desc.load([tile_n * BLOCK_N, k * BLOCK_K])
            w_up = w_up_desc.load([tile_n * BLOCK_N, k * BLOCK_K])
            gate = dot(x, tl.trans(w_gate), gate, PRECISION)
            up = dot(x, tl.trans(w_up), up, PRECISION)
        gate_rounded = narrow(gate, dtype)
        up_rounded = narrow(up, dtype)
        if STORE_GATE_UP:
            gate_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], gate_rounded)
            up_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], up_rounded)
        value = activate(gate_rounded.to(tl.float32), ACTIVATION) * up_rounded.to(tl.float32)
        out_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], narrow(value, dtype))


def reason_against_gated(
    x: torch.Tensor, w_gate_up: torch.Tensor, out: torch.Tensor, gate_up: torch.Tensor | None
) -> str | None:
    """None, or why these operands can't be moved by descriptors."""
    stored = () if gate_up is None else gate_up.chunk(2, 1)
    return reason_against_descriptors(x, *w_gate_up.chunk(2), out, *stored)


def gated_mlp_descriptor_out(
    x: torch.Tensor, w_gate_up: torch.Tensor, out: torch.Tensor, *, activation: str,
    gate_up: torch.Tensor | None = None, precision: str = "ieee",
    config: MatmulConfig | None = None,
) -> torch.Tensor:
    """Write act(gate) * up into out [M, F]; gate_up [M, 2F] receives both if given."""
    m, f, k = check_gated(x, w_gate_up, out, gate_up, activation)
    reason = reason_against_gated(x, w_gate_up, out, gate_up)
    if reason:
        raise ValueError(f"gated_mlp_descriptor: {reason}; call gated_mlp")
    row = config or descriptor_config("gated_mlp", architecture(x), m, f, x.element_size())
    tile, weight_tile = [row.block_m, row.block_n], [row.block_n, row.block_k]
    weights = [TensorDescriptor.from_tensor(w, weight_tile) for w in w_gate_up.chunk(2)]
    # A tile at the edge of gate must not reach into up: each half has edges of its own.
    stored = [None, None] if gate_up is None else [
        TensorDescriptor.from_tensor(half, tile) for half in gate_up.chunk(2, 1)
    ]
    gated_mlp_descriptor_kernel[(min(row.tiles(m, f), num_processors(x)),)](
        TensorDescriptor.from_tensor(x, [row.block_m, row.block_k]), *weights,
        TensorDescriptor.from_tensor(out, tile), *stored, m, f, k,
        BLOCK_M=row.block_m, BLOCK_N=row.block_n, BLOCK_K=row.block_k, GROUP_M=row.group_m,
        STORE_GATE_UP=gate_up is not None, ACTIVATION=activation, PRECISION=precision,
        dtype=TRITON_TYPES[x.dtype], num_warps=row.num_warps, num_stages=row.num_stages,
    )
    return out


def gated_mlp_on_best_path(
    x: torch.Tensor, w_gate_up: torch.Tensor, out: torch.Tensor | None = None, *,
    activation: str, gate_up: torch.Tensor | None = None,
) -> torch.Tensor:
    """gated_mlp_descriptor_out where the device copies tiles by itself and descriptors pay,
    else gated_mlp_out."""
    m, f = x.shape[0], w_gate_up.shape[0] // 2
    if out is None:
        out = torch.empty(m, f, dtype=x.dtype, device=x.device)
    fits = (
        x.dtype in FLOATS[1:]
        and descriptors_pay("gated_mlp", architecture(x), m, f, x.element_size())
        and reason_against_gated(x, w_gate_up, out, gate_up) is None
    )
    run = gated_mlp_descriptor_out if fits else gated_mlp_out
    return run(x, w_gate_up, out, activation=activation, gate_up=gate_up)
