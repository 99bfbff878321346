"""Soft-capping: scores and logits squashed into (-cap, cap), and hardly changed near 0.

    forward   y = cap tanh(x / cap)
    backward  dx = dy (1 - tanh(x / cap)^2)

Pointwise, so a shard's result is the shard of the result: logits whose vocabulary is cut are capped
where they lie. Infinities give +-cap, and NaN NaN. Communication: none.
Source: Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size", section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyparallel import backend


def run_torch(x: Tensor, cap: float) -> Tensor:
    """``cap tanh(x / cap)`` in x's dtype, rounded at each step as transformers does. Differentiable."""
    return torch.tanh(x / cap) * cap


def run_reference(x: Tensor, cap: float) -> Tensor:
    """The equation in fp32 (fp64 for fp64 inputs), rounded once. Differentiable."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (torch.tanh(x.to(wide) / cap) * cap).to(x.dtype)


def softcap(x: Tensor, cap: float) -> Tensor:
    """``cap tanh(x / cap)`` on the backend that the table finds. Differentiable.

    Args:
        x: of any shape.
        cap: more than 0; no result is farther from 0.

    Raises:
        ValueError: cap is not a number above 0.
    """
    if not cap > 0.0:
        raise ValueError(
            f"cap: expected more than 0, got {cap}; leave logits as they are without one"
        )
    return backend.call("softcap", x, float(cap))
