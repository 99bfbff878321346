"""What `pip wheel` builds: one wheel that holds the library, its kernels and its extension."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a build needs, and no more: not the results of an earlier build.
INPUTS = ("pyparallel", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("source")
    built = shutil.ignore_patterns("*.so", "__pycache__", "build")
    for name in INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=built)
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"]
    run([*command, "--no-deps", "--wheel-dir", "wheels", "."], copy)
    (found,) = (copy / "wheels").glob("*.whl")
    return found


def test_the_wheel_holds_every_module(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("pyparallel", "pyparallel"), ("kernels", "pyparallel/kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            name = f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
            assert name in held, f"{name}: add its package to pyproject.toml"
    assert [name for name in held if name.startswith("pyparallel/_C.") and name.endswith(".so")]
    assert not [name for name in held if name.startswith(("tests", "bench", "csrc"))]


def test_it_imports_from_a_folder_of_its_own(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--target", str(tmp_path / "site"), str(wheel)], tmp_path)
    script = """
import pathlib, sys
# Before the editable install, if there is one.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
import pyparallel, pyparallel._C, pyparallel.layers, pyparallel.kernels
site = pathlib.Path(sys.argv[1])
for module in (pyparallel, pyparallel._C, pyparallel.layers, pyparallel.kernels):
    assert site in pathlib.Path(module.__file__).parents, module
print("imported")
"""
    output = run(
        [sys.executable, "-c", script, str(tmp_path / "site")],
        tmp_path,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert output.strip() == "imported"
