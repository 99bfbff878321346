"""``attention`` on the CPU: flash prefill, and split-KV decoding that reads a cache where it lies."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyparallel.native.cpu.ops import attention as run  # noqa: F401
from pyparallel.native.cpu.ops import attention_reason, plain_reason


def reason(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    """Why a call can't run here, or None."""
    return plain_reason(q, k, v) or attention_reason(q, k, v, **options)
