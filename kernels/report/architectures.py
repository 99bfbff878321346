"""Which architectures the installed Triton compiles for, as it says itself, and whose tiles they get.

An architecture that configurations.py has no row for is compiled with those of a relative, to be looked
at; no kernel runs there by itself.
"""

from __future__ import annotations

import difflib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import triton

from pyparallel.kernels.configurations import ARCHITECTURES, family

CUDA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def target_of(arch: str) -> Any:
    """Triton's target of a name.

    Raises:
        ValueError: the name is no architecture's; the nearest one is told.
    """
    from triton.backends.compiler import GPUTarget

    if re.fullmatch(r"sm_\d{2,3}", arch):
        return GPUTarget("cuda", int(arch[3:]), 32)
    if re.fullmatch(r"gfx[1-9][0-9a-f]{2,3}", arch):
        # CDNA's waves have 64 lanes, RDNA's 32.
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise ValueError(
        f"arch: expected {', '.join(ARCHITECTURES[:-1])} or {ARCHITECTURES[-1]}, got {arch!r}; or "
        f"another that this Triton compiles for{_nearest(arch)}"
    )


def configured_as(arch: str) -> str:
    """The architecture whose shipped tiles ``arch`` is compiled with; itself where it has some."""
    if arch.startswith("gfx9") and arch not in ("gfx942", "gfx950"):
        return "gfx942"
    try:
        family(arch)
        return arch
    except ValueError:
        if arch.startswith("gfx"):
            return "gfx942"
        return "sm_86" if int(arch[3:]) < 90 else "sm_100"


def check_accepted(archs: Sequence[str]) -> None:
    """Raise for the first architecture that Triton does not take.

    Those with tiles of their own are known. The others are asked about: a kernel of one line is compiled
    for each, in a process of its own, since an unknown processor may end LLVM, and the process with it.

    Raises:
        ValueError: the name is no architecture's, or Triton's compilers refuse it.
    """
    for arch in archs:
        target_of(arch)
    for arch in archs:
        if arch in ARCHITECTURES:
            continue
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as asked:
            try:
                reason = asked.submit(refusal_of, arch).result()
            except BrokenProcessPool:
                reason = "its compiler ended the process"
        if reason:
            raise ValueError(
                f"arch: expected one that Triton {triton.__version__} compiles for, got {arch!r}: "
                f"{reason}{_nearest(arch)}"
            )


@triton.jit
def _store_one(out_ptr):
    triton.language.store(out_ptr, 1)


def refusal_of(arch: str) -> str | None:
    """Why Triton does not compile for ``arch``, in a few words; None where it does."""
    from triton.compiler import ASTSource

    source = ASTSource(_store_one, {"out_ptr": "*i32"}, {}, {})
    with tempfile.TemporaryFile() as heard:
        # MLIR says why on standard error, among pages of other things; this process is our own.
        os.dup2(heard.fileno(), 2)
        try:
            triton.compile(source, target=target_of(arch))
            return None
        except Exception as error:
            heard.seek(0)
            said = f"{heard.read().decode(errors='replace')}\n{error}"
            found = re.search(r"(?:error|fatal) *: *(.+)", said)
            return (found[1] if found else f"{type(error).__name__}: {error}").strip()[:200]


def _nearest(arch: str) -> str:
    """Of what NVIDIA's assembler says that it takes, and of what has tiles here."""
    tool = CUDA_TOOLS / "ptxas"
    known = set(ARCHITECTURES)
    if tool.exists():
        told = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout
        known |= set(re.findall(r"'(sm_\d+)'", told))
    near = difflib.get_close_matches(arch, sorted(known - {arch}), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""
