"""The house's order: who may import or include whom, and how long a file may be."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("kernels", "csrc", "pyparallel", "bench", "tests", "examples")
MAX_LINES = 300
MAX_FILES = 30
MAX_VARIABLES = 9

# Lowest first. A file imports from lower floors, or from its own without going in circles.
PYTHON_FLOORS = (
    ("kernels", "_C"),
    ("limits", "autocast", "reference", "backend", "version"),
    ("cut",),
    ("checkpoint",),
    ("native",),
    ("comm",),
    ("mesh",),
    ("profiling",),
    ("ranks",),
    ("launch",),
    ("overlap",),
    ("ops",),
    ("layers",),
    ("models",),
    ("training",),
    ("saving",),
    ("trainer",),
    ("decoding",),
    ("planner",),
    ("drawing",),
    ("commands", "cli", "__main__"),
    # The public names, and what tests of parallel code need.
    ("", "testing"),
)
# What each folder of csrc may include beside its own files; lowest first.
CSRC_FOLDERS = {
    "core": set(),
    "cpu/simd": {"core"},
    "cpu/world": {"core", "cpu/simd"},
    "cpu/kernels": {"core", "cpu/simd"},
    "cpu/ops": {"core", "cpu/simd", "cpu/world", "cpu/kernels"},
    "cpu/decoder": {"core", "cpu/simd", "cpu/world", "cpu/kernels", "cpu/ops"},
    "bindings": {"core", "cpu/simd", "cpu/world", "cpu/kernels", "cpu/ops", "cpu/decoder"},
    "cuda/kernels": {"core"},
    "cuda/world": {"core", "cuda/kernels"},
    "cuda/nccl": {"core", "cuda/world"},
    "cuda/bindings": {"core", "cuda/kernels", "cuda/world", "cuda/nccl"},
}
TORCH_FOLDERS = {"bindings", "cuda/bindings"}
# A fragment (.inl) is included in the middle of a file, once for each instruction set.
CSRC_SUFFIXES = (".h", ".inl", ".cpp", ".cu", ".cuh")
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|caffe2|pybind11)/|^(torch|Python)\.h$")


def floor_of(module: str) -> int:
    """The floor of ``pyparallel.x.y``; an unknown file has none, and must be given one."""
    name = module.removeprefix("pyparallel").removeprefix(".").split(".")[0]
    for floor, names in enumerate(PYTHON_FLOORS):
        if name in names:
            return floor
    raise AssertionError(f"{module}: give it a floor in PYTHON_FLOORS")


def python_modules(root: Path) -> dict[str, Path]:
    """Every module of the library by its name; kernels/ is installed as pyparallel.kernels."""
    found = {}
    for folder, package in (("pyparallel", "pyparallel"), ("kernels", "pyparallel.kernels")):
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root / folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join((package, *parts))] = path
    return found


def imports(path: Path, module: str) -> Iterator[str]:
    """Every pyparallel name that a file imports, wherever in it the import stands."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join((*above, *([base] if base else [])))
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "pyparallel")


def python_edges(root: Path) -> dict[str, set[str]]:
    """Which modules each module imports."""
    modules = python_modules(root)
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        edges[module] = set()
        for name in imports(path, module):
            # `from a.b import c`: c is a module, or a name in the module a.b.
            while name not in modules and "." in name and name != "pyparallel._C":
                name = name.rpartition(".")[0]
            if name != module:
                edges[module].add(name)
    return edges


def python_faults(root: Path) -> list[str]:
    edges = python_edges(root)
    faults = []
    for module, targets in sorted(edges.items()):
        for target in sorted(targets):
            if module.startswith("pyparallel.kernels"):
                if not target.startswith("pyparallel.kernels"):
                    faults.append(f"{module} imports {target}: kernels know only kernels")
            elif floor_of(target) > floor_of(module):
                faults.append(f"{module} imports {target}, of a higher floor")
    return faults + [f"a circle: {' -> '.join(circle)}" for circle in circles(edges)]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each import that closes one; a package may import what is in it."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
            return
        if module in done:
            return
        for target in sorted(edges.get(module, ())):
            if not module.startswith(target + "."):
                visit(target, [*path, module])
        done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found


def includes(path: Path) -> list[tuple[str, str]]:
    """The includes of a file: what opens the name, and the name."""
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), re.M)


def include_faults(root: Path) -> list[str]:
    csrc = root / "csrc"
    edges: dict[str, set[str]] = {}
    faults = []
    for path in sorted(csrc.rglob("*")):
        if path.suffix not in CSRC_SUFFIXES:
            continue
        name, folder = path.relative_to(csrc).as_posix(), path.parent.relative_to(csrc).as_posix()
        allowed = CSRC_FOLDERS[folder] | {folder}
        once = "\n#pragma once\n" in "\n" + path.read_text()
        if path.suffix in (".h", ".cuh") and not once:
            faults.append(f"{name} lacks #pragma once; a fragment is called .inl")
        edges[name] = set()
        for kind, target in includes(path):
            if TORCH_HEADER.search(target) and folder not in TORCH_FOLDERS:
                faults.append(f"{name} includes {target}: only bindings know torch and Python")
            if kind == '"':
                edges[name].add(target)
                if target.rpartition("/")[0] not in allowed:
                    known = ", ".join(sorted(allowed))
                    faults.append(f"{name} includes {target}: may be of {known}")
    return faults + [f"a circle: {' -> '.join(circle)}" for circle in circles(edges)]


def test_python_imports_go_down():
    assert not python_faults(ROOT)


def test_includes_go_down():
    assert not include_faults(ROOT)


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("pyparallel/cut/shard.py", "from pyparallel.layers import norm", "of a higher floor"),
        (
            "pyparallel/cut/shard.py",
            "def f():\n    from pyparallel import cli",
            "of a higher floor",
        ),
        ("pyparallel/layers/norm.py", "from .parallel_mlp import ParallelMLP", "a circle"),
        (
            "kernels/norm/norm.py",
            "from pyparallel.cut.shard import fuse",
            "kernels know only kernels",
        ),
        ("kernels/norm/norm.py", "import pyparallel.comm.group", "kernels know only kernels"),
        ("csrc/core/part.h", "#include <torch/csrc/stable/ops.h>", "only bindings know torch"),
        ("csrc/core/part.h", '#include "cpu/kernels/norm.inl"', "may be of core"),
        ("csrc/core/part.h", '#include "part.h"', "may be of core"),
        ("csrc/cuda/kernels/norm.cuh", "#include <ATen/ATen.h>", "only bindings know torch"),
        (
            "csrc/cuda/kernels/norm.cuh",
            '#include "bindings/bindings.h"',
            "may be of core, cuda/kernels",
        ),
        ("csrc/cpu/kernels/norm.inl", '#include "cpu/kernels/linear.inl"', "a circle"),
        (
            "csrc/cpu/kernels/norm.inl",
            '#include "cpu/decoder/pass.h"',
            "may be of core, cpu/kernels",
        ),
        ("csrc/cpu/kernels/linear.h", "", "lacks #pragma once"),
    ],
)
def test_a_broken_rule_is_found(tmp_path, name, line, fault):
    files = {
        "pyparallel/__init__.py": "",
        "pyparallel/cli.py": "import pyparallel.layers",
        "pyparallel/cut/shard.py": "",
        "pyparallel/comm/group.py": "",
        "pyparallel/layers/__init__.py": "from pyparallel.layers.norm import x",
        "pyparallel/layers/norm.py": "from pyparallel.cut import shard",
        "pyparallel/layers/parallel_mlp.py": "from pyparallel.layers.norm import x",
        "kernels/__init__.py": "",
        "kernels/norm/norm.py": "from . import language",
        "kernels/language.py": "",
        "csrc/core/part.h": "#pragma once\n#include <vector>",
        "csrc/cuda/kernels/norm.cuh": '#pragma once\n#include "core/part.h"',
        "csrc/cpu/kernels/norm.inl": '#include "core/part.h"',
        "csrc/cpu/kernels/linear.inl": '#include "cpu/kernels/norm.inl"',
    }
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text + "\n")
    assert not python_faults(tmp_path) + include_faults(tmp_path)
    with (tmp_path / name).open("a") as file:
        file.write(line + "\n")
    faults = python_faults(tmp_path) + include_faults(tmp_path)
    assert any(fault in found for found in faults), faults


def code_files() -> list[Path]:
    found = [path for folder in CODE for path in (ROOT / folder).rglob("*")]
    return [path for path in [ROOT / "setup.py", *found] if path.suffix in (".py", *CSRC_SUFFIXES)]


def test_no_file_is_longer_than_can_be_read():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in code_files()
    }
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_folder_holds_more_than_can_be_seen():
    held = Counter(str(path.parent.relative_to(ROOT)) for path in code_files())
    del held["pyparallel/ops"]  # Until its rows have folders of their own.
    assert {folder: count for folder, count in held.items() if count > MAX_FILES} == {}


def test_few_environment_variables():
    names = set()
    for path in code_files():
        if path.relative_to(ROOT).parts[0] != "tests":
            names |= set(re.findall(r"[\"'](PYPARALLEL_[A-Z_]+)[\"']", path.read_text()))
    assert names
    assert len(names) <= MAX_VARIABLES, sorted(names)


def test_no_path_of_one_machine():
    # Written in halves, so that this file passes its own test.
    places = re.compile(
        "|".join(rf"(?<![\w.])/{name}/" for name in ("work", "home", "root", "tmp"))
    )
    text_files = [*code_files(), *ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "Makefile"]
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if places.search(line)
    ]
    assert not found
