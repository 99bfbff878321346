"""Triton as Python sees it: whether its kernels (:mod:`pyparallel.kernels`) can run on a tensor.

On CPU tensors they run in Triton's interpreter, and only where ``triton`` is asked for by name.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

from torch import Tensor

from pyparallel.backend import constant_in_graphs

_UNASKED = "the tensor is on cpu, where Triton's interpreter runs kernels only if asked for by name"


@constant_in_graphs
@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why no kernel can run here, or None."""
    return None if find_spec("triton") is not None else "triton is not installed"


def reason_against(x: Tensor, asked: bool) -> str | None:
    """Why no kernel can run on a tensor that lies where ``x`` does, or None.

    Args:
        asked: whether ``triton`` is asked for by name.
    """
    if x.is_cuda:
        return missing()
    if not x.is_cpu:
        return f"the tensor is on {x.device.type}"
    return _reason_on_cpu() if asked else _UNASKED


@constant_in_graphs
def _reason_on_cpu() -> str | None:
    if (reason := missing()) is not None:
        return reason
    from pyparallel.kernels.launch import INTERPRETING

    if INTERPRETING:
        return None
    return (
        "the tensor is on cpu; CPU tensors need the interpreter, which PYPARALLEL_BACKEND=triton or "
        "TRITON_INTERPRET=1 chooses before triton is first imported"
    )
