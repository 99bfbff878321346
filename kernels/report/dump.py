"""What the compiler made of a kernel, as text: its stages, down to the machine's own instructions."""

from __future__ import annotations

import multiprocessing
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import triton

from pyparallel.kernels.report.architectures import (
    CUDA_TOOLS,
    check_accepted,
    configured_as,
    target_of,
)
from pyparallel.kernels.report.cases import all_cases, suggestion
from pyparallel.kernels.report.compile_kernel import compiled_of
from pyparallel.kernels.report.report import compiling_environment

# The kinds of each vendor, from Triton's own form to what runs.
KINDS = {
    "cuda": ("ttir", "ttgir", "llir", "ptx", "sass"),
    "hip": ("ttir", "ttgir", "llir", "amdgcn"),
}


def dump(kind: str, name: str, archs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(what it is, text) of every configuration of kernel ``name``, for each architecture.

    Raises:
        ValueError: no kernel is called so, Triton does not take an architecture, or that has no such
            kind; the way out is told.
    """
    for arch in archs:
        kinds = KINDS[target_of(arch).backend]
        if kind not in kinds:
            raise ValueError(f"--dump: expected one of {', '.join(kinds)} for {arch}, got {kind!r}")
    chosen = []
    for arch in archs:
        cases = all_cases(configured_as(arch))
        found = [(arch, index, case) for index, case in enumerate(cases) if case.name == name]
        if not found:
            near = suggestion(cases, name)
            raise ValueError(f"--dump: expected a kernel's name, got {name!r}{near}")
        chosen += found
    context = multiprocessing.get_context("spawn")
    with compiling_environment(), ProcessPoolExecutor(1, mp_context=context) as compiling:
        check_accepted(archs)
        for arch, index, case in chosen:
            text = compiling.submit(text_of, kind, arch, index).result()
            yield f"{case.name} [{case.variant}] for {arch}", text


def text_of(kind: str, arch: str, index: int) -> str:
    """One stage of one case; named by place, because kernels don't travel."""
    made = compiled_of(all_cases(configured_as(arch))[index], arch).asm
    if kind != "sass":
        return str(made[kind])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made["cubin"])
        cubin.flush()
        command = [CUDA_TOOLS / "cuobjdump", "-sass", cubin.name]
        told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        raise RuntimeError(f"cuobjdump of Triton {triton.__version__}: {told.stderr.strip()}")
    return told.stdout
