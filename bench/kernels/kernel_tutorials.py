"""Triton's tutorial matmul and fused attention as compile cases, from a checkout of Triton.

The tutorials are scripts that ask for a GPU and run benchmarks when imported, and no package carries
them. So only their kernels are taken, at bench time: the functions under `triton.jit`, without
`autotune`, written to a file of a temporary folder and imported from there. Nothing of them is kept.
"""

from __future__ import annotations

import ast
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

MATMUL, ATTENTION = "03-matrix-multiplication.py", "06-fused-attention.py"
HEADER = "import triton\nimport triton.language as tl\n\n\n"


def kernels_of(script: Path) -> ModuleType:
    """A module of the script's `triton.jit` functions alone."""
    tree = ast.parse(script.read_text())
    kept = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        names = [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]
        if "triton.jit" in names:
            node.decorator_list = [ast.parse("triton.jit", mode="eval").body]
            kept.append(ast.unparse(node))
    # Kernels are read back from their file when they are compiled, so it must stay.
    folder = Path(tempfile.mkdtemp(prefix="tutorial-"))
    path = folder / f"{script.stem.replace('-', '_')}.py"
    path.write_text(HEADER + "\n\n\n".join(kept) + "\n")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def case_of(
    name: str, variant: str, kernel: Any, pointers: dict[str, str], constants: dict[str, Any],
    integers: tuple[str, ...], warps: int, stages: int, floats: tuple[str, ...] = (),
):  # fmt: skip
    """A compile case from what the kernel's arguments are called, in any release's version of it.

    Raises:
        ValueError: it has an argument that none of the names given here explains.
    """
    from pyparallel.kernels.report.compile_kernel import Case

    known = {*pointers, *constants, *integers, *floats}
    strange = [arg for arg in kernel.arg_names if arg not in known]
    if strange:
        raise ValueError(
            f"{name}: expected arguments among {sorted(known)}, got also {strange}; "
            "give them a meaning in bench/kernels/kernel_tutorials.py"
        )

    def own(values: dict[str, Any]) -> dict[str, Any]:
        return {arg: value for arg, value in values.items() if arg in kernel.arg_names}

    floats = tuple(arg for arg in floats if arg in kernel.arg_names)
    return Case(name, variant, kernel, own(pointers), own(constants), warps, stages, floats=floats)


def tutorials(folder: Path, arch: str) -> Iterator[tuple[str, object]]:
    """(ours of the same operation, a compile case of theirs), in tiles of their own lists."""
    matmul = kernels_of(folder / MATMUL).matmul_kernel
    amd = arch.startswith("gfx")
    m, n, k = (128, 128, 64) if amd else (128, 256, 64)
    warps, stages = (4, 2) if amd else (8, 3)
    units = dict.fromkeys(("stride_ak", "stride_bn", "stride_cn"), 1)
    yield (
        "matmul",
        case_of(
            "tutorial matmul",
            f"fp16 {m}x{n}x{k} w{warps} s{stages}",
            matmul,
            dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), "fp16"),
            units
            | {"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": 8}
            | {"ACTIVATION": "", "IS_INT8": False},
            ("M", "N", "K", "stride_am", "stride_bk", "stride_cm"),
            warps,
            stages,
        ),
    )
    forward = kernels_of(folder / ATTENTION)._attn_fwd
    warps, stages = (4, 1) if amd else (8, 3)
    strides = [f"stride_{t}{axis}" for t in "qkvo" for axis in "zhmnk"]
    last = {"stride_qk": 1, "stride_kk": 1, "stride_vn": 1, "stride_on": 1}
    if "desc_q" in forward.arg_names:
        last = {}
        tiles = {"desc_q": 128, "desc_k": 64, "desc_v": 64, "desc_o": 128}
        pointers = {name: f"tensordesc<fp16[{size}, 128]>" for name, size in tiles.items()}
        if arch in ("sm_80", "gfx942"):
            # Without a copy engine the kernel makes descriptors of plain pointers.
            pointers = dict.fromkeys(tiles, "fp16")
    else:
        pointers = dict.fromkeys(("Q", "K", "V", "Out"), "fp16")
    yield (
        "attention",
        case_of(
            "tutorial attention",
            f"fp16 d128 causal 128x64 w{warps} s{stages}",
            forward,
            pointers | {"M": "fp32"},
            last
            | {"HEAD_DIM": 128, "BLOCK_M": 128, "BLOCK_N": 64, "STAGE": 3, "CAUSAL": True}
            | {"FP8_OUTPUT": False, "warp_specialize": False, "IS_HOPPER": arch == "sm_90"},
            ("Z", "H", "N_CTX", *(s for s in strides if s not in last)),
            warps,
            stages,
            floats=("sm_scale",),
        ),
    )
