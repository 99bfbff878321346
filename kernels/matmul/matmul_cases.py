"""The matmuls of one device in every shipped configuration, as compile cases."""

from __future__ import annotations

from collections.abc import Iterator

from pyparallel.kernels.configurations import descriptor_rows, gated_mlp_config, matmul_rows
from pyparallel.kernels.matmul import gated_mlp, gated_mlp_descriptor, matmul, matmul_descriptor
from pyparallel.kernels.report.compile_kernel import Case

_TYPES = {"half": "bf16", "ieee": "fp32", "tf32": "fp32"}

_TF32_WGRAD = "wgmma takes tf32 with K contiguous only: the transposing copies move one element"


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
            EVEN_K=True, SWAP=row.swap, SPLIT=False, HAS_SCALE=False, HAS_BIAS=True,
            HAS_RESIDUAL=True, STORE_PRE=False, ACTIVATION="none",
            PRECISION=operand if operand in ("ieee", "tf32") else "ieee",
        )
        yield Case(
            "matmul", f"{operand} {shape} {row.label}", matmul.matmul_kernel, pointers,
            constants | dict(stride_xk=1, stride_wk=1, stride_on=1, stride_rn=1),
            row.num_warps, row.num_stages, tensor_core=operand != "ieee", waiver=row.note,
        )
        if operand == "half":
            yield Case(
                "matmul_split", f"{operand} {shape} {row.label}", matmul.matmul_kernel,
                {"x_ptr": kind, "w_ptr": kind, "out_ptr": "fp32"},
                constants | dict.fromkeys(("bias_ptr", "residual_ptr", "pre_ptr"))
                | dict(stride_xk=1, stride_wk=1, stride_on=1, SPLIT=True, HAS_BIAS=False,
                       HAS_RESIDUAL=False),
                row.num_warps, row.num_stages, tensor_core=True, waiver=row.note,
            )
    yield Case(
        "split_k_sum", "bf16 of 4", matmul.split_k_sum_kernel,
        {"slabs_ptr": "fp32", "out_ptr": "bf16", "bias_ptr": "bf16"},
        dict.fromkeys(("x_scale_ptr", "w_scale_ptr", "residual_ptr", "pre_ptr"))
        | dict(stride_on=1, BLOCK_N=matmul.SUM_BLOCK, SPLIT_K=4, HAS_SCALE=False, HAS_BIAS=True,
               HAS_RESIDUAL=False, STORE_PRE=False, ACTIVATION="none"),
        matmul.SUM_WARPS, waiver="waves of 64 lanes: a short block, so that one row has programs",
    )


def _descriptors(**blocks: tuple[str, int, int]) -> dict[str, str]:
    return {f"{name}_desc": f"tensordesc<{kind}[{rows}, {columns}]>"
            for name, (kind, rows, columns) in blocks.items()}


def matmul_descriptor_cases(arch: str) -> Iterator[Case]:
    for itemsize, row in descriptor_rows("matmul", arch):
        kind = "bf16" if itemsize == 2 else "fp8e4nv"
        for what, x_along_k, w_along_k in (("", True, True), ("_dgrad", True, False),
                                           ("_wgrad", False, False)):
            if itemsize == 1 and what:
                continue
            x = (row.block_m, row.block_k) if x_along_k else (row.block_k, row.block_m)
            w = (row.block_n, row.block_k) if w_along_k else (row.block_k, row.block_n)
            yield Case(
                f"matmul_descriptor{what}", f"{'half' if itemsize == 2 else 'fp8'} {row.label}",
                matmul_descriptor.matmul_descriptor_kernel,
                _descriptors(x=(kind, *x), w=(kind, *w), out=("bf16", row.block_m, row.block_n))
                | {"bias_ptr": "bf16"},
                dict(BLOCK_M=row.block_m, BLOCK_N=row.block_n, BLOCK_K=row.block_k,
                     GROUP_M=row.group_m, X_ALONG_K=x_along_k, W_ALONG_K=w_along_k, HAS_BIAS=True,
                     ACTIVATION="none", PRECISION="ieee", dtype=matmul_descriptor.tl.bfloat16),
                row.num_warps, row.num_stages, tensor_core=True,
            )


def gated_mlp_descriptor_cases(arch: str) -> Iterator[Case]:
    for _, row in descriptor_rows("gated_mlp", arch):
        tile = ("bf16", row.block_m, row.block_n)
        weight = ("bf16", row.block_n, row.block_k)
        for stored in (False, True):
            halves = _descriptors(gate=tile, up=tile) if stored else {}
            yield Case(
                "gated_mlp_descriptor", f"half {row.label}" + " +gate_up" * stored,
                gated_mlp_descriptor.gated_mlp_descriptor_kernel,
                _descriptors(x=("bf16", row.block_m, row.block_k), w_gate=weight, w_up=weight,
                             out=tile) | halves,
                ({} if stored else {"gate_desc": None, "up_desc": None})
                | dict(BLOCK_M=row.block_m, BLOCK_N=row.block_n, BLOCK_K=row.block_k,
                       GROUP_M=row.group_m, STORE_GATE_UP=stored, ACTIVATION="silu",
                       PRECISION="ieee", dtype=gated_mlp_descriptor.tl.bfloat16),
                row.num_warps, row.num_stages, tensor_core=True,
            )


def matmul_transposed_cases(arch: str) -> Iterator[Case]:
    """The two backward matmuls: the forward kernel on transposed views."""
    for operand, shape, row in matmul_rows(arch):
        if shape != "wide" or operand == "fp8":
            continue
        kind = _TYPES[operand]
        for what, ones in (
            ("dgrad", {"stride_xk": 1, "stride_wn": 1}), ("wgrad", {"stride_xm": 1, "stride_wn": 1})
        ):
            yield Case(
                f"matmul_{what}", f"{operand} {shape} {row.label}", matmul.matmul_kernel,
                {"x_ptr": kind, "w_ptr": kind, "out_ptr": kind},
                ones | dict.fromkeys(
                    ("x_scale_ptr", "w_scale_ptr", "bias_ptr", "residual_ptr", "pre_ptr")
                ) | dict(
                    stride_on=1, BLOCK_M=row.block_m, BLOCK_N=row.block_n, BLOCK_K=row.block_k,
                    GROUP_M=row.group_m, EVEN_K=True, SWAP=row.swap, SPLIT=False, HAS_SCALE=False,
                    HAS_BIAS=False, HAS_RESIDUAL=False, STORE_PRE=False, ACTIVATION="none",
                    PRECISION=operand if operand in ("ieee", "tf32") else "ieee",
                ), row.num_warps, row.num_stages, tensor_core=operand != "ieee",
                waiver=row.note or (_TF32_WGRAD if operand == "tf32" else ""),
            )


def gated_mlp_cases(arch: str) -> Iterator[Case]:
    for operand, kind, itemsize in (("half", "bf16", 2), ("ieee", "fp32", 4)):
        for shape, m in (("decode", 16), ("thin", 64), ("wide", 4096)):
            row = gated_mlp_config(arch, m, itemsize)
            yield Case(
                "gated_mlp", f"{operand} {shape} {row.label}", gated_mlp.gated_mlp_kernel,
                {"x_ptr": kind, "w_ptr": kind, "out_ptr": kind},
                dict(gate_up_ptr=None, stride_xk=1, stride_wk=1, BLOCK_M=row.block_m,
                     BLOCK_N=row.block_n, BLOCK_K=row.block_k, GROUP_M=row.group_m, EVEN_K=True,
                     STORE_GATE_UP=False, ACTIVATION="silu", PRECISION="ieee"),
                row.num_warps, row.num_stages, tensor_core=operand == "half", waiver=row.note,
            )
