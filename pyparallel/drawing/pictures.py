"""The pictures of the documents.

python -m pyparallel.drawing.pictures docs/pictures
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from pyparallel.drawing.draw import draw
from pyparallel.planner.shape import model_shape
from pyparallel.planner.strategy import Strategy

PICTURES: dict[str, Callable[[], str]] = {
    "llama-3.1-8b": lambda: draw(
        model_shape("llama-3.1-8b"), Strategy(dp=2, pp=2, tp=3, sp=True), shares=(2, 1, 1)
    ),
    "llama-3.1-405b": lambda: draw(
        model_shape("llama-3.1-405b"), Strategy(pp=2, tp=8), tokens=8192
    ),
    "qwen2.5-7b": lambda: draw(
        model_shape("qwen2.5-7b"), Strategy(dp=2, cp=2, tp=8, sp=True), tokens=131072
    ),
}


def main(folder: Path) -> None:
    """Write them all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in PICTURES.items():
        (folder / f"{name}.svg").write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
