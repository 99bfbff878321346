"""The NCCL communicator's C++ against a scripted NCCL: see tests/native/test_nccl_communicator.cpp."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = "build/cuda/test_nccl_communicator"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the headers beside nvcc")
def test_the_communicator_against_a_scripted_nccl() -> None:
    """Bounded creation, aborts, polls from a second thread, windows; under ThreadSanitizer."""
    make = ["make", "-s", PROGRAM, f"CUDA_PYTHON={sys.executable}"]
    subprocess.run(make, cwd=ROOT, check=True)
    result = subprocess.run([str(ROOT / PROGRAM)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 12
