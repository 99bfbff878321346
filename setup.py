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


def extension() -> CppExtension:
    return CppExtension(
        "pyparallel._C",
        sources("csrc/bindings", "csrc/cpu"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=[str(path) for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".inl")],
        extra_compile_args={"cxx": CXX_FLAGS},
    )


class BuildAll(BuildExtension):
    """Builds pyparallel._C, and pyparallel._cuda by cuda.mk where it can be used.

    `make cuda` builds the CUDA extension on any machine with nvcc; here it also takes a CUDA torch.
    """

    def run(self) -> None:
        super().run()
        if torch.version.cuda is None or shutil.which("nvcc") is None:
            return
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
