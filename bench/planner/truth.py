"""What a reader of published measurements yields: predicted and measured, side by side.

A module ``truth_*.py`` of this folder has ``READERS``: by a file's name, how its rows are read;
:func:`readers` joins them, so that no list names all files.
"""

from __future__ import annotations

import json
import pkgutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Pair:
    """One measurement and what the planner says of it.

    Attributes:
        quantity: what was measured, as the table's line is called: "step time", "peak memory", ...
        predicted, measured: in ``unit``.
        floor: what the naive formula says (a roofline of three constants, one line of memory).
        unit: "s", "GiB", "tokens/s", ...; "label" where both are 0 or 1 (fits, fails).
        calibrated: whether constants were fitted on this very row's file.
        label: names the row.
        group: rows of one group are rivals, of which a plan picks the fastest; "" where there are none.
    """

    quantity: str
    predicted: float
    measured: float
    floor: float
    unit: str
    calibrated: bool
    label: str
    group: str = ""

    @property
    def error(self) -> float:
        """|predicted / measured - 1|."""
        return abs(self.predicted / self.measured - 1)

    @property
    def floor_error(self) -> float:
        """|floor / measured - 1|."""
        return abs(self.floor / self.measured - 1)


@dataclass
class Reading:
    """All of one file.

    Attributes:
        pairs: what could be compared.
        unused: how many rows could not, by the reason.
    """

    pairs: list[Pair] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)


Reader = Callable[[Mapping[str, Any]], Reading]


def readers() -> dict[str, Reader]:
    """The reader of each known file name, of all ``truth_*`` modules beside this one.

    Where several modules read one file (for its times, for its memory) all their pairs come.
    """
    found: dict[str, Reader] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith("truth_"):
            for name, reader in import_module(f"bench.planner.{module.name}").READERS.items():
                found[name] = _both(found[name], reader) if name in found else reader
    return found


def _both(first: Reader, second: Reader) -> Reader:
    def reader(content: Mapping[str, Any]) -> Reading:
        one, other = first(content), second(content)
        return Reading(one.pairs + other.pairs, one.unused + other.unused)

    return reader


def read(path: Path, reader: Reader) -> Reading:
    """What a reader makes of a file.

    Raises:
        ValueError: the file can't be read or is no JSON object.
    """
    return reader(load(path))


def load(path: Path) -> dict[str, Any]:
    """The content of a file of measurements.

    Raises:
        ValueError: the file can't be read or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: expected JSON") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object")
    return content
