"""Sessions of the C++ extension."""

from __future__ import annotations

from torch import nn


def reason(model: nn.Module, asked: bool) -> None:
    """The extension is always here."""
