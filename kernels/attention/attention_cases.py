"""The attention kernels' compile cases; see cases.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyparallel.kernels.attention import (
    attention,
    attention_backward,
    attention_backward_kv,
    attention_decode,
)
from pyparallel.kernels.attention.attention_configurations import attention_rows
from pyparallel.kernels.launch import next_power_of_two
from pyparallel.kernels.report.compile_kernel import Case

_TYPES = {"half": "bf16", "ieee": "fp32", "tf32": "fp32"}
_DECODE = "16 rows of scores a step, bound by the cache's bytes: wgmma and tcgen05 need 64 rows"


_MASKED = ("boolean", "additive")


def _masking(mask: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The pointers and the constants that a mask adds to a case."""
    if mask not in _MASKED:
        return {}, {"mask_ptr": None, "MASK": "none"}
    return {"mask_ptr": "u8" if mask == "boolean" else "bf16"}, {"MASK": mask, "stride_mt": 1}


def attention_cases(arch: str) -> Iterator[Case]:
    for operand, size, row in attention_rows(arch, "forward"):
        kind = _TYPES[operand]
        for d in {64: (64,), 128: (80, 96, 128), 256: (256,)}[size]:
            for mask in ("causal", "full", "window", "varlen causal", *_MASKED):
                if mask != "causal" and (operand != "half" or d in (80, 96)):
                    continue
                if mask == "additive" and d != 128:
                    continue
                varlen = "varlen" in mask
                pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), kind)
                pointers |= {"lse_ptr": "fp32"}
                if varlen:
                    pointers |= {"cu_q_ptr": "i32", "cu_k_ptr": "i32"}
                masking = _masking(mask)
                pointers |= masking[0]
                yield Case(
                    "attention", f"{operand} d{d} {mask} {row.label}", attention.attention_kernel,
                    pointers,
                    dict(D=d, CAUSAL="causal" in mask, WINDOW=mask == "window", VARLEN=varlen,
                         PRECISION="ieee", BLOCK_M=row.block_m, BLOCK_N=row.block_n,
                         BLOCK_D=next_power_of_two(d)) | masking[1]
                    | ({} if varlen else {"cu_q_ptr": None, "cu_k_ptr": None}),
                    row.num_warps, row.num_stages, floats=("scale_log2",),
                    odd=("N", "G", "window"), tensor_core=operand == "half", waiver=row.note,
                )


def attention_backward_cases(arch: str) -> Iterator[Case]:
    for which, kernel, outputs in (
        ("backward_kv", attention_backward_kv.attention_backward_kv_kernel, ("dk_ptr", "dv_ptr")),
        ("backward_q", attention_backward.attention_backward_q_kernel, ("dq_ptr",)),
    ):
        for operand, size, row in attention_rows(arch, which):
            kind = _TYPES[operand]
            for d in {64: (64,), 128: (80, 96, 128), 256: (256,)}[size]:
                for mask in ("causal", "full", "window", "varlen causal", *_MASKED):
                    if mask != "causal" and (operand != "half" or d != 128):
                        continue
                    varlen = "varlen" in mask
                    names = ("q_ptr", "k_ptr", "v_ptr", "do_ptr", *outputs)
                    pointers = dict.fromkeys(names, kind)
                    pointers |= {"base_ptr": "fp32", "delta_ptr": "fp32"}
                    pointers |= {"cu_q_ptr": "i32", "cu_k_ptr": "i32"} if varlen else {}
                    masking = _masking(mask)
                    pointers |= masking[0]
                    constants = dict(
                        D=d, CAUSAL="causal" in mask, WINDOW=mask == "window", VARLEN=varlen,
                        PRECISION="ieee", BLOCK_M=row.block_m, BLOCK_N=row.block_n,
                        BLOCK_D=next_power_of_two(d),
                    ) | masking[1] | ({} if varlen else {"cu_q_ptr": None, "cu_k_ptr": None})
                    yield Case(
                        f"attention_{which}", f"{operand} d{d} {mask} {row.label}", kernel,
                        pointers, constants, row.num_warps, row.num_stages, floats=("scale",),
                        odd=("N", "G", "window"), tensor_core=operand == "half", waiver=row.note,
                    )
    yield Case(
        "attention_delta", "bf16 d128", attention_backward.attention_delta_kernel,
        dict.fromkeys(("o_ptr", "do_ptr"), "bf16")
        | dict.fromkeys(("lse_ptr", "delta_ptr", "base_ptr"), "fp32"),
        dict(dlse_ptr=None, D=128, HAS_DLSE=False, BLOCK_M=32, BLOCK_D=128), 4,
        waiver="one fp32 a row: 128 bytes a program",
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
