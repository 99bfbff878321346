"""Constants that were fitted to measurements: a JSON a subject in ``data/fits``, with its sources."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "data" / "fits"


@cache
def read_fits(subject: str) -> dict[str, Any]:
    """What is known of ``communication`` or ``inference``; read once."""
    return json.loads((FOLDER / f"{subject}.json").read_text())


def system_of(gpu_name: str) -> str:
    """The name that the measurements give to the machine of a GPU: ``h100_sxm`` for an H100-SXM5-80GB.

    A GPU that is none of theirs keeps its own name.
    """
    return read_fits("communication")["systems"].get(gpu_name, gpu_name)
