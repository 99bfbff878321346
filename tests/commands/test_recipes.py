"""docs/recipes.md says what the command answers now.

python -m tests.commands.test_recipes      write its answers anew
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyparallel.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
# A command, perhaps cut short by head, and what follows up to the block's end.
BLOCK = re.compile(r"^\$ pyparallel (plan [^\n|]*?)(?: \| head -(\d+))?\n(.*?)^```$", re.M | re.S)


def answer(command: str, lines: str | None) -> str:
    """What a terminal shows of it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        main(shlex.split(command))
    return "".join(said.getvalue().splitlines(keepends=True)[: int(lines) if lines else None])


def blocks() -> Iterator[re.Match[str]]:
    yield from BLOCK.finditer(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("block", list(blocks()), ids=lambda block: block[1])
def test_the_page_is_current(block: re.Match[str]) -> None:
    assert block[3] == answer(block[1], block[2])


def test_every_command_is_looked_at() -> None:
    assert PAGE.read_text(encoding="utf-8").count("\n$ ") == sum(1 for _ in blocks()) >= 20


def write() -> None:
    """Every answer of the page by the command's own."""
    page = PAGE.read_text(encoding="utf-8")
    for block in blocks():
        page = page.replace(block[0], block[0].replace(block[3], answer(block[1], block[2])))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    write()
