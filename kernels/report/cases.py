"""Every kernel in every shipped configuration, as compile cases; one function an operation.

A kernel's file may bring its own: `compile_cases(arch)`, found by its name.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import pyparallel.kernels as package
from pyparallel.kernels.attention.attention_cases import (
    attention_backward_cases,
    attention_cases,
    attention_decode_cases,
)
from pyparallel.kernels.collective import (
    all_gather_matmul,
    all_reduce_residual_rms_norm,
    collectives,
    matmul_all_reduce,
    matmul_reduce_scatter,
)
from pyparallel.kernels.configurations import (
    WIDE_ROW,
    beside_flags,
    elementwise_config,
    matmul_rows,
    row_warps,
)
from pyparallel.kernels.elementwise import dropout, gated_activation, rope
from pyparallel.kernels.launch import next_power_of_two
from pyparallel.kernels.loss import cross_entropy
from pyparallel.kernels.matmul.matmul_cases import (
    gated_mlp_cases,
    gated_mlp_descriptor_cases,
    matmul_cases,
    matmul_descriptor_cases,
    matmul_transposed_cases,
)
from pyparallel.kernels.norm import norm, norm_backward
from pyparallel.kernels.report.compile_kernel import Case

_DROP_FLOATS, _DROP_LONGS = ("eps", "keep_scale"), ("seed", "keep_threshold")


def norm_cases(arch: str) -> Iterator[Case]:
    for width in (2048, 4096, 8192, 16384):
        warps = row_warps(next_power_of_two(width))
        wide = width > WIDE_ROW
        for center, drop in ((False, False), (True, False), (False, True)):
            if wide and drop:
                continue
            what = f"{'layer_norm' if center else 'rms_norm'} +residual{' +dropout' * drop} H{width}"
            pointers = dict.fromkeys(
                ("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "h_ptr"), "bf16"
            ) | {"rstd_ptr": "fp32"}
            pointers |= {"bias_ptr": "bf16", "mean_ptr": "fp32"} if center else {}
            missing = {} if center else {"bias_ptr": None, "mean_ptr": None}
            yield Case(
                "norm", f"bf16 {what}", norm.norm_kernel, pointers,
                missing | dict(
                    CENTER=center, HAS_RESIDUAL=True, HAS_BIAS=center, HAS_WEIGHT=True,
                    STORE_H=True, STORE_STATS=True, DROPOUT=drop,
                    BLOCK_H=next_power_of_two(width),
                ), warps, floats=_DROP_FLOATS, longs=_DROP_LONGS, odd=_DROP_LONGS,
            )
            if drop and width >= WIDE_ROW:
                continue
            pointers = dict.fromkeys(
                ("dout_ptr", "h_ptr", "weight_ptr", "dh_after_ptr", "dh_ptr", "dx_ptr"), "bf16"
            ) | {"rstd_ptr": "fp32", "dweight_ptr": "fp32"}
            pointers |= {"mean_ptr": "fp32", "dbias_ptr": "fp32"} if center else {}
            missing = {} if center else {"dbias_ptr": None, "mean_ptr": None}
            missing |= {"dbias_ptr": None} if wide else {}
            yield Case(
                "norm_backward", f"bf16 {what}", norm_backward.norm_backward_kernel, pointers,
                missing | dict(
                    CENTER=center, HAS_WEIGHT=True, HAS_BIAS=center and not wide, HAS_AFTER=True,
                    DROPOUT=drop, WIDE=wide, BLOCK_H=next_power_of_two(width),
                ), warps, floats=_DROP_FLOATS, longs=_DROP_LONGS, odd=_DROP_LONGS,
            )
    yield Case(
        "norm_weight_gradient", "bf16 layer_norm", norm_backward.norm_weight_gradient_kernel,
        {"dout_ptr": "bf16", "h_ptr": "bf16", "mean_ptr": "fp32", "rstd_ptr": "fp32",
         "dweight_ptr": "fp32", "dbias_ptr": "fp32"},
        dict(CENTER=True, HAS_WEIGHT=True, HAS_BIAS=True, BLOCK_H=2048), 4,
    )
    yield Case(
        "column_sum", "fp32", norm_backward.column_sum_kernel,
        {"x_ptr": "fp32", "out_ptr": "fp32"}, dict(ACCUMULATE=False, BLOCK_M=16, BLOCK_H=128), 4,
        waiver="one sum a thread: 128 columns, 512 bytes a program",
    )
    stream = elementwise_config(arch, "stream")
    yield Case(
        "dropout", "bf16 +residual", dropout.dropout_kernel,
        {"x_ptr": "bf16", "residual_ptr": "bf16", "out_ptr": "bf16"},
        dict(HAS_RESIDUAL=True, BLOCK_H=stream.block), stream.num_warps, floats=_DROP_FLOATS,
        longs=_DROP_LONGS, odd=_DROP_LONGS,
    )


def elementwise_cases(arch: str) -> Iterator[Case]:
    stream = elementwise_config(arch, "stream")
    for d in (64, 128):
        yield Case(
            "rope", f"bf16 d{d}", rope.rope_kernel,
            {"x_ptr": "bf16", "out_ptr": "bf16", "cos_ptr": "fp32", "sin_ptr": "fp32"},
            dict(positions_ptr=None, E=d // 2, INVERSE=False, INTERLEAVED=False,
                 HAS_POSITIONS=False, COPY_REST=False, BLOCK_N=stream.block * 2 // d,
                 BLOCK_E=d // 2, BLOCK_REST=1), stream.num_warps, odd=("N", "S"),
        )
    for activation in ("silu", "gelu_tanh"):
        names = ("gate_ptr", "up_ptr", "out_ptr", "dout_ptr", "dgate_ptr", "dup_ptr")
        for name, kernel in (
            ("gated_activation", gated_activation.gated_activation_kernel),
            ("gated_activation_backward", gated_activation.gated_activation_backward_kernel),
        ):
            yield Case(
                name, f"bf16 {activation}", kernel,
                {n: "bf16" for n in names if n in kernel.arg_names},
                dict(ACTIVATION=activation, HAS_UP=True, BLOCK_F=stream.block), stream.num_warps,
            )


def cross_entropy_cases(arch: str) -> Iterator[Case]:
    block = cross_entropy.BLOCK_V
    yield Case(
        "cross_entropy_statistics", "bf16", cross_entropy.cross_entropy_statistics_kernel,
        {"logits_ptr": "bf16", "targets_ptr": "i64", "stats_ptr": "fp32"},
        dict(BLOCK_V=block, CENTERED=True), 8,
        odd=("ignore_index",), waiver="stores four fp32 values a row, one by one",
    )
    yield Case(
        "cross_entropy_combine", "R8", cross_entropy.cross_entropy_combine_kernel,
        {"stats_ptr": "fp32", "targets_ptr": "i64", "loss_ptr": "fp32", "lse_ptr": "fp32"},
        dict(R=8, SMOOTH=True, BLOCK_T=128), 4, floats=("label_smoothing",),
        odd=("ignore_index",), waiver="one row a lane, [R, T, 4] fp32: a few bytes a token",
    )
    yield Case(
        "cross_entropy_backward", "bf16", cross_entropy.cross_entropy_backward_kernel,
        {
            "logits_ptr": "bf16", "targets_ptr": "i64", "lse_ptr": "fp32", "dloss_ptr": "fp32",
            "base_ptr": "fp32",
        },
        dict(BLOCK_V=block), 8, floats=("label_smoothing",), odd=("ignore_index", "stride_d"),
    )


_SYMMETRIC = {"addresses_ptr": "i64", "state_ptr": "i32"}
_RANK = dict(longs=("capacity", "timeout_ns"), odd=("rank", "timeout_ns"))
_RANKS = 8


def collective_cases(arch: str) -> Iterator[Case]:
    config = elementwise_config(arch, "collective")
    for name in ("all_reduce_one_shot", "all_reduce_two_shot", "all_gather", "reduce_scatter"):
        kernel = getattr(collectives, f"{name}_kernel")
        pointers = {"x_ptr": "bf16", "out_ptr": "bf16", **_SYMMETRIC}
        constants: dict[str, Any] = dict(R=_RANKS, BLOCK=config.block)
        if "starts_ptr" in kernel.arg_names:
            pointers["starts_ptr"] = "i64"
            constants["ALIGNED"] = True
        yield Case(name, f"bf16 R{_RANKS}", kernel, pointers, constants, config.num_warps, **_RANK)
    for two_shot in (False, True):
        yield Case(
            "all_reduce_residual_rms_norm",
            f"bf16 R{_RANKS} H4096 {'two' if two_shot else 'one'}_shot",
            all_reduce_residual_rms_norm.all_reduce_residual_rms_norm_kernel,
            dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "h_ptr", "out_ptr"), "bf16")
            | _SYMMETRIC,
            dict(R=_RANKS, TWO_SHOT=two_shot, BLOCK_H=4096), row_warps(4096), floats=("eps",),
            **_RANK,
        )


def fused_matmul_cases(arch: str) -> Iterator[Case]:
    for operand, shape, row in matmul_rows(arch, few=False):
        if operand != "half":
            continue
        row = beside_flags(row)
        tile = dict(
            BLOCK_M=row.block_m, BLOCK_N=row.block_n, BLOCK_K=row.block_k, GROUP_M=row.group_m,
            EVEN_K=True, SWAP=row.swap, PRECISION="ieee", R=_RANKS,
        )
        ones = dict(stride_xk=1, stride_wk=1)
        pointers = {"x_ptr": "bf16", "w_ptr": "bf16", "out_ptr": "bf16", "starts_ptr": "i64"}
        pointers |= _SYMMETRIC
        rest = dict(num_warps=row.num_warps, num_stages=row.num_stages, tensor_core=True, **_RANK)
        yield Case(
            "all_gather_matmul", f"half {shape} {row.label}",
            all_gather_matmul.all_gather_matmul_kernel, pointers | {"gathered_ptr": "bf16"},
            tile | dict(stride_wk=1, bias_ptr=None, NUM_COPY=all_gather_matmul.NUM_COPY,
                        HAS_BIAS=False, ACTIVATION="none"), **rest,
        )
        yield Case(
            "matmul_reduce_scatter", f"half {shape} {row.label}",
            matmul_reduce_scatter.matmul_reduce_scatter_kernel, pointers,
            tile | ones | dict(bias_ptr=None, residual_ptr=None, HAS_BIAS=False,
                               HAS_RESIDUAL=False), **rest,
        )
        for two_shot in (False, True):
            without = {k: v for k, v in pointers.items() if k != "starts_ptr"}
            yield Case(
                "matmul_all_reduce",
                f"half {shape} {'two' if two_shot else 'one'}_shot {row.label}",
                matmul_all_reduce.matmul_all_reduce_kernel, without | {"residual_ptr": "bf16"},
                tile | ones | dict(bias_ptr=None, HAS_BIAS=False, HAS_RESIDUAL=True,
                                   TWO_SHOT=two_shot, SUM_M=min(row.block_m, 16)), **rest,
            )


FAMILIES = (
    matmul_cases, matmul_transposed_cases, matmul_descriptor_cases, gated_mlp_cases,
    gated_mlp_descriptor_cases, attention_cases, attention_backward_cases,
    attention_decode_cases, norm_cases, elementwise_cases, cross_entropy_cases,
    collective_cases, fused_matmul_cases,
)


def all_cases(arch: str) -> list[Case]:
    """Every case of an architecture, in the order of the report."""
    own = [m.compile_cases for m in kernel_modules() if hasattr(m, "compile_cases")]
    return [case for family in (*FAMILIES, *own) for case in family(arch)]


def suggestion(cases: Sequence[Case], name: str) -> str:
    """For a message: the nearest of the cases' names, or all."""
    names = sorted({case.name for case in cases})
    near = difflib.get_close_matches(name, names, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}"


@lru_cache(maxsize=1)
def kernel_modules() -> tuple[Any, ...]:
    """Every file of the package, in the order of their names."""
    found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    return tuple(import_module(module.name) for module in found)
