"""``attention_with_lse`` on Triton: the flash kernel, which has the log-sum-exp anyway."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyparallel.kernels.attention.attention import attention as run  # noqa: F401


def reason(q: Tensor, k: Tensor, *_: Any, mask: Tensor | None = None, **__: Any) -> str | None:
    """Why a call can't run here, or None; also of the gradient."""
    if mask is not None and mask.dtype is not torch.bool:
        return f"expected a boolean mask, got {mask.dtype}"
    return "the kernel has no fp64" if q.dtype == torch.float64 else None
