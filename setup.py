"""Builds ``pyparallel._C``: the C++ extension on every machine, the CUDA part where it can be.

Everything that is data stands in pyproject.toml; this file only knows how to compile. SIMD paths
are chosen at run time, so no ``-march`` flag appears here. ``MAX_JOBS`` bounds parallel compiles.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
VARIABLE = "PYPARALLEL_CUDA"
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
]


def sources(*folders: str) -> list[str]:
    """Every .cpp in and under the folders, relative to the root as setuptools wants it."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.cpp"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def headers() -> list[str]:
    """What the extension's objects are made anew for. An sdist takes no absolute paths."""
    found = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".inl"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def extension() -> CppExtension:
    return CppExtension(
        "pyparallel._C",
        sources("csrc/bindings", "csrc/cpu"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=headers(),
        extra_compile_args={"cxx": CXX_FLAGS},
        # Python's own flags ask for debug information, which is 40 MB here; the linker leaves it out.
        extra_link_args=["-Wl,--strip-all"],
    )


def lacking_for_cuda() -> str | None:
    """Why pyparallel._cuda is not built, or None where it is to be.

    PYPARALLEL_CUDA: 1 builds it on any machine with nvcc, or fails; 0 never does. Where that is not set
    it is built where torch can use it, and a build that fails leaves the CPU's part.
    """
    asked = os.environ.get(VARIABLE)
    if asked not in (None, "0", "1"):
        raise SystemExit(f"{VARIABLE}: expected 0 or 1, got {asked!r}")
    if asked == "0":
        return f"{VARIABLE}=0"
    if shutil.which(os.environ.get("NVCC", "nvcc")) is None:
        return "nvcc, the compiler of the CUDA toolkit, is not on the PATH"
    if asked is None and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None


class BuildAll(BuildExtension):
    """Builds pyparallel._C, and pyparallel._cuda by cuda.mk where it is wanted and can be."""

    def run(self) -> None:
        super().run()
        lacking = lacking_for_cuda()
        if lacking is None:
            try:
                self.build_cuda()
                return
            except (OSError, subprocess.CalledProcessError) as error:
                lacking = f"its build failed ({error}); what it printed is above"
        if os.environ.get(VARIABLE) == "1":
            raise SystemExit(f"{VARIABLE}=1: the CUDA extension is not built: {lacking}")
        print(
            f"pyparallel: built for CPUs, without the CUDA extension: {lacking}. {VARIABLE}=1 makes "
            f"that an error",
            file=sys.stderr,
        )

    def build_cuda(self) -> None:
        jobs = os.environ.get("MAX_JOBS", "2")
        command = ["make", "-f", "cuda.mk", f"-j{jobs}", "cuda", f"CUDA_PYTHON={sys.executable}"]
        subprocess.run(command, cwd=ROOT, check=True)
        if not self.inplace:
            for library in (ROOT / "pyparallel").glob("_cuda*.so"):
                shutil.copy2(library, Path(self.build_lib) / "pyparallel" / library.name)


def packages() -> list[str]:
    """Every folder of pyparallel/, and those of kernels/, which is installed as pyparallel.kernels."""
    return [
        *find_packages(include=["pyparallel", "pyparallel.*"]),
        "pyparallel.kernels",
        *(f"pyparallel.kernels.{name}" for name in find_packages("kernels")),
    ]


setup(packages=packages(), ext_modules=[extension()], cmdclass={"build_ext": BuildAll})
