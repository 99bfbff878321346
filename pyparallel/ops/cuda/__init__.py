"""Rows of the CUDA extension: one file an op. For GPUs on which Triton is absent, or beside it."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from pyparallel.backend import constant_in_graphs
from pyparallel.native import FLOATS
from pyparallel.native.cuda import extension


def reason(x: Tensor, asked: bool) -> str | None:
    """Why no row of this folder can run a call on ``x``: where it lies, or what is missing here."""
    return _missing() if x.is_cuda else f"the input is on {x.device.type}"


def dtype_reason(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels, which take one dtype a call, can't take these."""
    if x.dtype not in FLOATS:
        return f"the kernels take no {x.dtype}"
    if any(t is not None and t.dtype != x.dtype for t in others):
        return "the dtypes of input and parameters differ"
    return None


def flat(x: Tensor) -> Tensor:
    """[..., H] as the dense rows that the kernels take."""
    return x.contiguous().view(-1, x.shape[-1])


@constant_in_graphs
@lru_cache(maxsize=1)
def _missing() -> str | None:
    missing = extension.missing()
    return missing[0] if missing else None
