"""``attention_with_lse_backward`` on Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyparallel.kernels.attention.attention_backward import attention_backward
from pyparallel.ops.triton.attention_with_lse import reason  # noqa: F401


def run(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """See :mod:`pyparallel.ops.attention_with_lse_backward`."""
    return attention_backward(do.contiguous(), q, k, v, o, lse, **options)
