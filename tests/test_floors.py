"""The house's order: who may import or include whom, and how long a file may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = ("kernels", "csrc", "pyparallel", "bench", "tests")
MAX_LINES = 300
# Longer still, to be cut: no other file may join them.
TO_BE_CUT = {
    "tests/layers/test_sequence_parallel_linear.py",
    "tests/native/test_cpu_kernels.py",
}
MAX_VARIABLES = 9

# Lowest first. A file imports from lower floors, or from its own without going in circles.
PYTHON_FLOORS = (
    ("kernels", "_C"),
    ("limits", "reference", "backend"),
    ("cut",),
    ("checkpoint",),
    ("native",),
    ("comm",),
    ("mesh",),
    ("ranks",),
    ("launch",),
    ("overlap",),
    ("ops",),
    ("layers",),
    ("models",),
    ("training",),
    ("saving",),
    ("decoding",),
    ("planner",),
    ("commands", "cli", "__main__"),
    # The public names, and what tests of parallel code need.
    ("", "testing"),
)
# What each folder of csrc may include of the others, and whether it may know torch.
CSRC_FOLDERS = {
    "core": ({"core"}, False),
    "cpu": ({"core", "cpu"}, False),
    "cuda": ({"core", "cuda"}, False),
    "cuda/bindings": ({"core", "cuda", "bindings"}, True),
    "bindings": ({"core", "cpu", "cuda", "bindings"}, True),
}
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


def include_faults(root: Path) -> list[str]:
    faults = []
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cu", ".cuh"):
            continue
        folder = path.parent.relative_to(root / "csrc").as_posix()
        allowed, knows_torch = CSRC_FOLDERS[folder]
        for kind, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), re.M):
            where = f"{path.relative_to(root)} includes {name}"
            if TORCH_HEADER.search(name) and not knows_torch:
                faults.append(f"{where}: only bindings know torch and Python")
            first = name.split("/")[0] if "/" in name else folder
            if kind == '"' and first in CSRC_FOLDERS and first not in allowed:
                faults.append(f"{where}: {folder} may include {', '.join(sorted(allowed))}")
    return faults


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
        ("csrc/core/part.h", '#include "cpu/norm.h"', "core may include core"),
        ("csrc/cuda/norm.cuh", "#include <ATen/ATen.h>", "only bindings know torch"),
        ("csrc/cuda/norm.cuh", '#include "bindings/bindings.h"', "cuda may include core, cuda"),
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
        "csrc/core/part.h": "#include <vector>",
        "csrc/cuda/norm.cuh": '#include "core/part.h"',
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
    suffixes = (".py", ".h", ".cpp", ".cu", ".cuh")
    found = [path for folder in CODE for path in (ROOT / folder).rglob("*")]
    return [path for path in [ROOT / "setup.py", *found] if path.suffix in suffixes]


def test_no_file_is_longer_than_can_be_read():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in code_files()
    }
    assert len(lengths) > 100
    long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert {name: length for name, length in long.items() if name not in TO_BE_CUT} == {}


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
