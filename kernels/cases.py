"""Every kernel in every shipped configuration, as compile cases; one function an operation."""
from __future__ import annotations

from collections.abc import Iterator

from . import matmul
from .compile_kernel import Case
from .configurations import matmul_rows

_TYPES = {"half": "bf16", "ieee": "fp32", "tf32": "fp32"}


def _operand_type(arch: str, operand: str) -> str:
    if operand == "fp8":
        return "fp8e4b8" if arch.startswith("gfx9") else "fp8e4nv"
    return _TYPES[operand]


def matmul_cases(arch: str) -> Iterator[Case]:
    for operand, shape, row in matmul_rows(arch):
        kind = _operand_type(arch, operand)
        out = "bf16" if operand == "fp8" else kind
        pointers = {"x_ptr": kind, "w_ptr": kind, "out_ptr": out, "bias_ptr": out,
                    "residual_ptr": out, "pre_ptr": out}
        constants = dict(
            x_scale_ptr=None, w_scale_ptr=None,
            BLOCK_M=row.block_m, BLOCK_N=row.block_n, BLOCK_K=row.block_k, GROUP_M=row.group_m,
            EVEN_K=True, SWAP=row.swap, SPLIT_K=1, HAS_SCALE=False, HAS_BIAS=True,
            HAS_RESIDUAL=True, STORE_PRE=False, ACTIVATION="none",
            PRECISION=operand if operand in ("ieee", "tf32") else "ieee",
        )
        yield Case(
            "matmul", f"{operand} {shape} {row.label}", matmul.matmul_kernel, pointers,
            constants | dict(stride_xk=1, stride_wk=1, stride_on=1, stride_rn=1),
            row.num_warps, row.num_stages, tensor_core=operand != "ieee", waiver=row.note,
        )
