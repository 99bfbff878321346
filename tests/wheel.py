"""``make wheel``: the source distribution, a wheel built from that alone, and whether the wheel works.

    python tests/wheel.py [--out dist] [--bare]

The wheel is built from the unpacked sdist, with the torch of the environment that runs this script, and
is then tried in a virtual environment of its own: imported, asked for its version, and run on two ranks.
The new environment sees this one's packages, but not this checkout; with ``--bare`` it installs
everything that the wheel asks for instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# No debug information, which is 40 MB.
MOST_BYTES = 8 << 20
WORK = """
import pathlib, sys
import torch
import pyparallel

def double():
    group = pyparallel.init_mesh(tp=2).tp
    return pyparallel.all_reduce(torch.ones(3), group).tolist()

if __name__ == "__main__":
    import pyparallel._C, pyparallel.kernels
    place = pathlib.Path(sys.prefix).resolve()
    for module in (pyparallel, pyparallel._C, pyparallel.kernels):
        assert place in pathlib.Path(module.__file__).resolve().parents, module
    assert pyparallel.launch(double, 2, threads=1) == [[2.0] * 3] * 2
    print(pyparallel.__version__)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What the command prints; its whole output and an end of this script where it fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.stderr.write(done.stdout[-8000:])
        raise SystemExit(f"wheel: {command[0]} ... {command[-1]} ended with {done.returncode}")
    return done.stdout


def build(out: Path) -> tuple[Path, Path]:
    """The sdist of this checkout, and the wheel of the sdist."""
    for old in [*out.glob("pyparallel_kernels-*.tar.gz"), *out.glob("pyparallel_kernels-*.whl")]:
        old.unlink()
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", script, out, cwd=ROOT)
    (sdist,) = out.glob("pyparallel_kernels-*.tar.gz")
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sdist) as packed:
        packed.extractall(folder, filter="data")
        (source,) = Path(folder).iterdir()
        pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps")
        run(*pip, "--wheel-dir", out, source, cwd=source)
    (wheel,) = out.glob("pyparallel_kernels-*.whl")
    return sdist, wheel


def check(wheel: Path, bare: bool) -> str:
    """The version that the installed wheel tells of itself.

    Raises:
        SystemExit: a file is missing or too large, or something fails.
    """
    with zipfile.ZipFile(wheel) as held:
        names = set(held.namelist())
        sizes = {name: held.getinfo(name).file_size for name in names if "/_C." in name}
    wanted = {"pyparallel/py.typed", "pyparallel/kernels/__init__.py", "pyparallel/planner/data"}
    missing = [one for one in wanted if not any(name.startswith(one) for name in names)]
    if missing or len(sizes) != 1 or max(sizes.values()) > MOST_BYTES:
        raise SystemExit(f"wheel: missing {missing}; of the extension {sizes}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        run(sys.executable, "-m", "venv", place / "venv", cwd=place)
        python = place / "venv" / "bin" / "python"
        install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        if bare:
            run(*install, wheel, cwd=place)
        else:
            run(*install, "--no-deps", "--no-index", wheel, cwd=place)
            # A path in a .pth file brings packages, but no .pth files of theirs: no editable install.
            purelib = run(
                python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=place
            )
            (Path(purelib.strip()) / "build_environment.pth").write_text(
                sysconfig.get_path("purelib")
            )
        (place / "work.py").write_text(WORK)
        command = python.with_name("pyparallel")
        told = run(command, "--version", cwd=place).split()[-1]
        run(command, "doctor", "--json", cwd=place)
        worked = run(python, place / "work.py", cwd=place).split()[-1]
        if worked != told:
            raise SystemExit(f"wheel: the command is {told}, the library {worked}")
        return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIR")
    parser.add_argument("--bare", action="store_true", help="install what the wheel asks for, too")
    args = parser.parse_args()
    if not shutil.which("g++"):
        raise SystemExit("wheel: expected g++, which compiles the extension, on the PATH")
    args.out.mkdir(parents=True, exist_ok=True)
    sdist, wheel = build(args.out.resolve())
    version = check(wheel, args.bare)
    for file in (sdist, wheel):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
    print(f"version {version}: installed, asked, and run on two ranks")


if __name__ == "__main__":
    main()
