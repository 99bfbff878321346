"""Every kernel in every shipped configuration, as compile cases; one function an operation."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from . import (
    attention,
    attention_backward,
    attention_decode,
    cross_entropy,
    dropout,
    gated_activation,
    matmul,
    norm,
    norm_backward,
    rope,
)
from .attention_configurations import attention_rows
from .compile_kernel import Case
from .configurations import WIDE_ROW, matmul_rows, row_warps
from .launch import next_power_of_two

_DECODE = "16 rows of scores a step, bound by the cache's bytes: wgmma and tcgen05 need 64 rows"
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


def attention_cases(arch: str) -> Iterator[Case]:
    for operand, size, row in attention_rows(arch, "forward"):
        kind = _TYPES[operand]
        for d in {64: (64,), 128: (80, 96, 128), 256: (256,)}[size]:
            for mask in ("causal", "full", "window", "varlen causal"):
                if mask != "causal" and (operand != "half" or d in (80, 96)):
                    continue
                varlen = "varlen" in mask
                pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), kind)
                pointers |= {"lse_ptr": "fp32"}
                if varlen:
                    pointers |= {"cu_q_ptr": "i32", "cu_k_ptr": "i32"}
                yield Case(
                    "attention", f"{operand} d{d} {mask} {row.label}", attention.attention_kernel,
                    pointers,
                    dict(D=d, CAUSAL="causal" in mask, WINDOW=mask == "window", VARLEN=varlen,
                         PRECISION="ieee", BLOCK_M=row.block_m, BLOCK_N=row.block_n,
                         BLOCK_D=next_power_of_two(d))
                    | ({} if varlen else {"cu_q_ptr": None, "cu_k_ptr": None}),
                    row.num_warps, row.num_stages, floats=("scale_log2",),
                    odd=("N", "G", "window"), tensor_core=operand == "half", waiver=row.note,
                )


def attention_backward_cases(arch: str) -> Iterator[Case]:
    for which, kernel, outputs in (
        ("backward_kv", attention_backward.attention_backward_kv_kernel, ("dk_ptr", "dv_ptr")),
        ("backward_q", attention_backward.attention_backward_q_kernel, ("dq_ptr",)),
    ):
        for operand, size, row in attention_rows(arch, which):
            kind = _TYPES[operand]
            for d in {64: (64,), 128: (80, 96, 128), 256: (256,)}[size]:
                for mask in ("causal", "full", "window", "varlen causal"):
                    if mask != "causal" and (operand != "half" or d != 128):
                        continue
                    varlen = "varlen" in mask
                    names = ("q_ptr", "k_ptr", "v_ptr", "do_ptr", *outputs)
                    pointers = dict.fromkeys(names, kind)
                    pointers |= {"lse_ptr": "fp32", "delta_ptr": "fp32"}
                    pointers |= {"cu_q_ptr": "i32", "cu_k_ptr": "i32"} if varlen else {}
                    constants = dict(
                        D=d, CAUSAL="causal" in mask, WINDOW=mask == "window", VARLEN=varlen,
                        PRECISION="ieee", BLOCK_M=row.block_m, BLOCK_N=row.block_n,
                        BLOCK_D=next_power_of_two(d),
                    ) | ({} if varlen else {"cu_q_ptr": None, "cu_k_ptr": None})
                    yield Case(
                        f"attention_{which}", f"{operand} d{d} {mask} {row.label}", kernel,
                        pointers, constants, row.num_warps, row.num_stages, floats=("scale",),
                        odd=("N", "G", "window"), tensor_core=operand == "half", waiver=row.note,
                    )
    yield Case(
        "attention_delta", "bf16 d128", attention_backward.attention_delta_kernel,
        {"o_ptr": "bf16", "do_ptr": "bf16", "delta_ptr": "fp32"},
        dict(dlse_ptr=None, D=128, HAS_DLSE=False, BLOCK_M=32, BLOCK_D=128), 4,
    )


def attention_decode_cases(arch: str) -> Iterator[Case]:
    for operand, size, row in attention_rows(arch, "decode"):
        kind = _TYPES[operand]
        for d in {64: (64,), 128: (80, 96, 128), 256: (256,)}[size]:
            for paged in (False, True):
                if paged and operand != "half":
                    continue
                pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), kind)
                pointers |= {"lengths_ptr": "i32", "part_o_ptr": "fp32", "part_lse_ptr": "fp32"}
                constants: dict[str, Any] = dict(
                    D=d, PAGED=paged, WINDOW=False, PRECISION="ieee", BLOCK_H=row.block_m,
                    BLOCK_N=row.block_n, BLOCK_D=next_power_of_two(d),
                )
                if paged:
                    pointers["table_ptr"] = "i32"
                else:
                    constants["table_ptr"] = None
                yield Case(
                    "attention_decode", f"{operand} d{d} {'paged ' * paged}{row.label}",
                    attention_decode.attention_decode_kernel, pointers, constants,
                    row.num_warps, row.num_stages, floats=("scale_log2",),
                    odd=("N", "G", "window"), tensor_core=operand == "half",
                    waiver=row.note or _DECODE,
                )
    yield Case(
        "attention_merge", "bf16 d128", attention_decode.attention_merge_kernel,
        {"part_o_ptr": "fp32", "part_lse_ptr": "fp32", "o_ptr": "bf16", "lse_ptr": "fp32"},
        dict(D=128, BLOCK_D=128), 1, odd=("N", "splits"),
        waiver="one row of 128 fp32 over 32 lanes: 16-byte loads, 8-byte bf16 stores",
    )


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
                    DROPOUT=drop, KEEP_WEIGHT=not wide, BLOCK_H=next_power_of_two(width),
                ), warps, floats=_DROP_FLOATS, longs=_DROP_LONGS, odd=_DROP_LONGS,
            )
    yield Case(
        "column_sum", "fp32", norm_backward.column_sum_kernel,
        {"x_ptr": "fp32", "out_ptr": "fp32"}, dict(ACCUMULATE=False, BLOCK_M=16, BLOCK_H=128), 4,
    )
    yield Case(
        "dropout", "bf16 +residual", dropout.dropout_kernel,
        {"x_ptr": "bf16", "residual_ptr": "bf16", "out_ptr": "bf16"},
        dict(HAS_RESIDUAL=True, BLOCK_H=1024), 4, floats=_DROP_FLOATS, longs=_DROP_LONGS,
        odd=_DROP_LONGS,
    )


def elementwise_cases(arch: str) -> Iterator[Case]:
    for d in (64, 128):
        yield Case(
            "rope", f"bf16 d{d}", rope.rope_kernel,
            {"x_ptr": "bf16", "out_ptr": "bf16", "cos_ptr": "fp32", "sin_ptr": "fp32"},
            dict(positions_ptr=None, E=d // 2, INVERSE=False, INTERLEAVED=False,
                 HAS_POSITIONS=False, COPY_REST=False, BLOCK_N=1024 * 2 // d, BLOCK_E=d // 2,
                 BLOCK_REST=1), 4, odd=("N", "S"),
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
                dict(ACTIVATION=activation, HAS_UP=True, BLOCK_F=1024), 4,
            )


def cross_entropy_cases(arch: str) -> Iterator[Case]:
    block = cross_entropy.BLOCK_V
    yield Case(
        "cross_entropy_statistics", "bf16", cross_entropy.cross_entropy_statistics_kernel,
        {"logits_ptr": "bf16", "targets_ptr": "i64", "stats_ptr": "fp32"}, dict(BLOCK_V=block), 8,
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
        {"logits_ptr": "bf16", "targets_ptr": "i64", "lse_ptr": "fp32", "dloss_ptr": "fp32"},
        dict(BLOCK_V=block), 8, floats=("label_smoothing",), odd=("ignore_index", "stride_d"),
    )
