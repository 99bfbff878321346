"""What `make wheel` builds: an sdist that builds, and a wheel of library, kernels and extension."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pyparallel

ROOT = Path(__file__).parents[1]
# What a build needs, and no more: not the results of an earlier build.
INPUTS = (
    *("pyparallel", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "cuda.mk"),
    *("README.md", "CHANGELOG.md", "LICENSE", "tests/wheel.py"),
)

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
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from it, installed somewhere else and run there."""
    copy = tmp_path_factory.mktemp("source")
    built = shutil.ignore_patterns("*.so", "__pycache__", "build")
    for name in INPUTS:
        source = ROOT / name
        (copy / name).parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=built)
        else:
            shutil.copy(source, copy / name)
    told = run([sys.executable, "tests/wheel.py"], copy)
    assert f"version {pyparallel.__version__}: installed, asked, and run on two ranks" in told
    (sdist,) = (copy / "dist").glob("*.tar.gz")
    (found,) = (copy / "dist").glob("*.whl")
    assert found.name.startswith(f"pyparallel_kernels-{pyparallel.__version__}-")
    return sdist, found


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    return built[1]


def test_the_sdist_holds_what_compiles_and_no_more(built):
    with tarfile.open(built[0]) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".inl", ".cpp", ".cu", ".cuh"):
            assert str(path.relative_to(ROOT)) in held, f"{path}: add its kind to MANIFEST.in"
    assert {"cuda.mk", "CHANGELOG.md", "LICENSE", "setup.py", "pyproject.toml"} <= held
    assert not [
        name for name in held if name.endswith(".so") or name.startswith(("tests", "bench"))
    ]


def test_the_extension_has_no_debug_information(wheel):
    with zipfile.ZipFile(wheel) as held:
        (name,) = (n for n in held.namelist() if n.startswith("pyparallel/_C."))
        assert b".debug_info" not in held.read(name)


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
