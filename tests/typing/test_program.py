"""The program that the type checker reads uses every public name; the package says that it is typed."""

from __future__ import annotations

import ast
from pathlib import Path

import pyparallel

PROGRAM = Path(__file__).with_name("program.py")


def test_every_public_name_is_in_the_typed_program() -> None:
    tree = ast.parse(PROGRAM.read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "pyparallel"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "pyparallel":
            used |= {alias.name for alias in node.names}
    assert set(pyparallel.__all__) <= used


def test_the_package_is_marked_as_typed() -> None:
    assert Path(pyparallel.__file__).with_name("py.typed").exists()
