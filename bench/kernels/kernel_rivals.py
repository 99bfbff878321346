"""Kernels of others, compiled like ours: registers, spills, shared memory, access widths.

    python bench/kernels/kernel_rivals.py [--arch sm_80 sm_90 sm_100 gfx942] [--tutorials DIR] [--json]

liger-kernel is optional and nothing of it is copied; its kernels are imported, and each stands
beside ours of the same operation at the same width, with the number of warps its launcher uses.
`--tutorials` adds Triton's tutorial matmul and fused attention from a checkout's python/tutorials.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from kernel_tutorials import tutorials

WIDTH = 4096
VOCABULARY_BLOCK = 32768


def rivals() -> Iterator[tuple[str, object]]:
    """(ours of the same operation, a compile case of theirs)."""
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
    from liger_kernel.ops.rms_norm import _rms_norm_backward_kernel, _rms_norm_forward_kernel
    from liger_kernel.ops.swiglu import _swiglu_backward_kernel, _swiglu_forward_kernel
    from liger_kernel.ops.utils import calculate_settings

    from pyparallel.kernels.report.compile_kernel import Case

    block, warps = calculate_settings(WIDTH)
    unit = dict.fromkeys(("W_row_stride", "RSTD_row_stride"), 1)
    norm = dict(casting_mode=0, elementwise_affine=True, BLOCK_SIZE=block)
    yield (
        "norm",
        Case(
            "liger rms_norm",
            f"bf16 H{WIDTH}",
            _rms_norm_forward_kernel,
            {"Y_ptr": "bf16", "X_ptr": "bf16", "W_ptr": "bf16", "RSTD_ptr": "fp32"},
            unit | norm,
            warps,
            floats=("eps", "offset"),
        ),
    )
    import triton.language as tl

    yield (
        "norm_backward",
        Case(
            "liger rms_norm backward",
            f"bf16 H{WIDTH}",
            _rms_norm_backward_kernel,
            {
                "dY_ptr": "bf16",
                "dX_ptr": "bf16",
                "X_ptr": "bf16",
                "W_ptr": "bf16",
                "RSTD_ptr": "fp32",
                "dW_ptr": "fp32",
            },
            unit | norm | dict(X_dtype=tl.bfloat16, COMPUTE_DW=True),
            warps,
            floats=("offset",),
        ),
    )
    width = 11008
    block, warps = calculate_settings(width)
    for ours, name, kernel in (
        ("gated_activation", "liger swiglu", _swiglu_forward_kernel),
        ("gated_activation_backward", "liger swiglu backward", _swiglu_backward_kernel),
    ):
        pointers = [n for n in kernel.arg_names if n.endswith("_ptr")]
        yield (
            ours,
            Case(
                name,
                f"bf16 F{width}",
                kernel,
                dict.fromkeys(pointers, "bf16"),
                dict(n_cols=width, BLOCK_SIZE=block),
                warps,
                floats=("gate_multiplier",),
            ),
        )
    pointers = {"X_ptr": "bf16", "Y_ptr": "i64", "loss_ptr": "fp32"}
    absent = dict.fromkeys(
        ("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr", "softcap")
    )
    yield (
        "cross_entropy_backward",
        Case(
            "liger cross_entropy (loss and gradient)",
            f"bf16 block {VOCABULARY_BLOCK}",
            liger_cross_entropy_kernel,
            pointers,
            absent
            | dict(
                Y_stride=1,
                loss_stride=1,
                token_accuracy_stride=0,
                predicted_tokens_stride=0,
                lse_square_scale=0.0,
                label_smoothing=0.0,
                reduction="mean",
                RETURN_Z_LOSS=False,
                RETURN_TOKEN_ACCURACY=False,
                RETURN_PREDICTED_TOKENS=False,
                BLOCK_SIZE=VOCABULARY_BLOCK,
                HAS_WEIGHT=False,
                HAS_SOFTCAPPING=False,
                HAS_GRADIENTS=True,
            ),
            32,
            floats=("sum_non_ignore_weight", "weight_sum"),
            odd=("n_non_ignore", "ignore_index"),
        ),
    )


def comparable(variant: str) -> bool:
    """Whether a configuration of ours does what the rivals' do: half precision, this width."""
    if variant.startswith("half"):
        return "wide" in variant or "d128 causal" in variant
    return variant.startswith("bf16") and ("H" not in variant.split()[-1] or f"H{WIDTH}" in variant)


def rows(archs: list[str], folder: Path | None = None) -> Iterator[dict[str, object]]:
    """Theirs, then ours, of each operation; folder: of Triton's tutorials."""
    from pyparallel.kernels.report.cases import all_cases
    from pyparallel.kernels.report.compile_kernel import compile_case
    from pyparallel.kernels.report.report import cache_directory

    for arch in archs:
        cases = all_cases(arch)
        pairs = list(rivals()) if find_spec("liger_kernel") else []
        if folder is not None:
            pairs += tutorials(folder, arch)
        for name, theirs in pairs:
            same = [c for c in cases if c.name == name and comparable(c.variant)]
            for case in (theirs, *same):
                figures = compile_case(case, arch, cache_directory())
                yield {"name": case.name, "arch": arch, "config": case.variant, **figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100", "gfx942"])
    parser.add_argument("--tutorials", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    # Compiled, not interpreted, whatever the caller's shell says.
    for name in ("TRITON_INTERPRET", "PYPARALLEL_BACKEND"):
        os.environ.pop(name, None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    liger = version("liger-kernel") if find_spec("liger_kernel") else None
    found = list(rows(args.arch, args.tutorials))
    if args.json:
        json.dump({"liger_kernel": liger, "kernels": found}, sys.stdout)
        return int(any(row["error"] for row in found))
    from pyparallel.kernels.report.report import markdown

    print(f"liger-kernel {liger or 'is not installed'}\n")
    print(markdown([{"wrong": [], "excused": [], **row} for row in found]))
    return int(any(row["error"] for row in found))


if __name__ == "__main__":
    sys.exit(main())
