"""Documents name files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# Where a path in a text may begin.
STARTS = ("", "pyparallel", "kernels", "csrc", "tests")
SUFFIXES = "py|h|inl|cpp|cu|cuh|md|svg|png|json|mk|toml"


def absent(text: str, folder: Path) -> list[str]:
    """Links of a document in ``folder``, and `paths` with a folder in them, that lead nowhere."""
    found = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in found if not (folder / link).exists()]
    named = re.findall(rf"`((?:[\w.]+/)+[\w.]+\.(?:{SUFFIXES}))`", text)
    return missing + [
        path for path in named if not any((ROOT / start / path).exists() for start in STARTS)
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    assert absent(document.read_text(), document.parent) == []


def test_a_name_of_nothing_is_found() -> None:
    text = "See `ops/linaer.py`, `ops/linear.py`, [this](nothing.md) and [that](../README.md)."
    assert absent(text, ROOT / "docs") == ["nothing.md", "ops/linaer.py"]
