"""``decode_session`` through the modules, whose ops then run on ``triton`` or say why they can't."""

from __future__ import annotations

from typing import Any

from pyparallel.decoding.decode_session import ModuleSession as run  # noqa: F401


def reason(*_: Any) -> None:
    """The session itself runs anywhere."""
