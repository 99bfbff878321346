"""``pipeline_session`` through the modules, whose ops then run on ``cuda`` or say why they can't."""

from __future__ import annotations

from typing import Any

from pyparallel.decoding.pipeline_session import PipelineSession as run  # noqa: F401


def reason(*_: Any) -> None:
    """The session itself runs anywhere."""
