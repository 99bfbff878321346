"""Sessions whose every op runs on Triton's kernels, where that is asked for by name."""

from __future__ import annotations

from torch import nn


def reason(model: nn.Module, asked: bool) -> str | None:
    """Why no session of this folder is taken: the modules' ops are chosen one by one otherwise."""
    return (
        None if asked else "each op of the modules is chosen by itself unless triton is asked for"
    )
