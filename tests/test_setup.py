"""setup.py: when the CUDA extension is built, and that one that fails leaves the CPU's part."""

from __future__ import annotations

import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from torch.utils.cpp_extension import BuildExtension

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines; nothing is built."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setattr(BuildExtension, "run", lambda self: None)
    monkeypatch.delenv("PYPARALLEL_CUDA", raising=False)
    monkeypatch.delenv("NVCC", raising=False)
    return runpy.run_path(str(SETUP))


def machine(monkeypatch: pytest.MonkeyPatch, *, nvcc: bool, cuda: bool, asked: str | None) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if nvcc else None)
    monkeypatch.setattr(torch.version, "cuda", "13.0" if cuda else None)
    if asked is not None:
        monkeypatch.setenv("PYPARALLEL_CUDA", asked)


@pytest.mark.parametrize(
    ("nvcc", "cuda", "asked", "lacking"),
    [
        (True, True, None, None),
        (True, False, None, "is built without CUDA"),
        (False, True, None, "nvcc, the compiler of the CUDA toolkit, is not on the PATH"),
        (True, True, "0", "PYPARALLEL_CUDA=0"),
        (True, False, "1", None),
        (False, True, "1", "nvcc, the compiler of the CUDA toolkit, is not on the PATH"),
    ],
)
def test_where_cuda_is_built(script, monkeypatch, nvcc, cuda, asked, lacking) -> None:
    machine(monkeypatch, nvcc=nvcc, cuda=cuda, asked=asked)
    told = script["lacking_for_cuda"]()
    assert told is None if lacking is None else lacking in told


def build(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With an nvcc that fails."""

    def fail(self: object) -> None:
        raise subprocess.CalledProcessError(2, ["make"])

    monkeypatch.setattr(script["BuildAll"], "build_cuda", fail)
    script["BuildAll"].run(object.__new__(script["BuildAll"]))


def test_an_nvcc_that_fails_leaves_the_cpus_part(script, monkeypatch, capsys) -> None:
    machine(monkeypatch, nvcc=True, cuda=True, asked=None)
    build(script, monkeypatch)
    assert "built for CPUs, without the CUDA extension: its build failed" in capsys.readouterr().err


def test_what_was_asked_for_by_name_fails(script, monkeypatch) -> None:
    machine(monkeypatch, nvcc=True, cuda=True, asked="1")
    with pytest.raises(SystemExit, match="PYPARALLEL_CUDA=1: the CUDA extension is not built: its"):
        build(script, monkeypatch)
    monkeypatch.setenv("PYPARALLEL_CUDA", "yes")
    with pytest.raises(SystemExit, match=r"^PYPARALLEL_CUDA: expected 0 or 1, got 'yes'$"):
        script["lacking_for_cuda"]()
