"""Rows of the C++ extension: one file an op."""

from __future__ import annotations

from torch import Tensor


def reason(x: Tensor, asked: bool) -> str | None:
    """Why no row of this folder can run a call on ``x``: the extension is always here."""
    return None if x.is_cpu else f"the tensor is on {x.device.type}"
