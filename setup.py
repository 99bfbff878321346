"""Builds ``pyparallel._C``: the C++ extension on every machine, the CUDA part where it can be.

Everything that is data stands in pyproject.toml; this file only knows how to compile. SIMD paths
are chosen at run time, so no ``-march`` flag appears here. ``MAX_JOBS`` bounds parallel compiles.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
CXX_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr"]


def sources(*folders: str) -> list[str]:
    """Every .cpp of the folders, relative to the root as setuptools wants it."""
    found = (path for folder in folders for path in (ROOT / folder).glob("*.cpp"))
    return sorted(str(path.relative_to(ROOT)) for path in found)


def cuda_sources() -> list[str]:
    """The CUDA sources, or none where nvcc or a CUDA build of torch is missing."""
    if torch.version.cuda is None or shutil.which("nvcc") is None:
        return []
    return (ROOT / "csrc/cuda/sources.txt").read_text().split()


def extension() -> CppExtension:
    files = sources("csrc/bindings", "csrc/cpu")
    options = {
        "include_dirs": [str(ROOT / "csrc"), pybind11.get_include()],
        "depends": [str(path) for path in (ROOT / "csrc").rglob("*.h")],
    }
    cuda = cuda_sources()
    if cuda:
        flags = {"cxx": [*CXX_FLAGS, "-DPYPARALLEL_CUDA"], "nvcc": NVCC_FLAGS}
        return CUDAExtension(
            "pyparallel._C", files + cuda, extra_compile_args=flags, libraries=["nccl"], **options
        )
    return CppExtension("pyparallel._C", files, extra_compile_args={"cxx": CXX_FLAGS}, **options)


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
