"""``torch.autocast`` for ops that torch doesn't dispatch.

Under autocast torch multiplies matrices, and attends, in autocast's dtype, whatever dtype the tensors
have, and gives the result in it; gradients come back in each tensor's own. An ``autograd.Function`` or a
kernel is not asked. So where such an op begins, its tensors are cast, by torch's own rules:

    if autocast.is_on():
        x, weight, bias = autocast.lowered(x, weight, bias)

Outside the function, not in it: autograd then casts the gradients back, and what the function keeps for
backward, which runs without autocast, is of one dtype. Collectives, norms, losses and pointwise ops work
in the dtype that they are given, and have nothing to do; sums over ranks are fp32's in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

# Of any device: the one question that every call asks, so nothing is wrapped around it.
is_on: Callable[[], bool] = torch._C._is_any_autocast_enabled


def lowered(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """``tensors`` in the dtype of their device's autocast; fp64, and what is not on such a device, as it
    is. Differentiable."""
    return tuple(None if tensor is None else _lowered(tensor) for tensor in tensors)


def _lowered(tensor: Tensor) -> Tensor:
    exempt = tensor.dtype is torch.float64 or not tensor.is_floating_point()
    if exempt or not _is_on_for(tensor):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _is_on_for(tensor: Tensor) -> bool:
    kind = tensor.device.type
    # Some devices, as meta, have none.
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def as_written(equation: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function whose body says in which dtypes it works, its first argument a tensor, do so under
    autocast too."""

    @wraps(equation)
    def run(x: Tensor, *args: object, **options: object) -> Result:
        if not is_on() or not _is_on_for(x):
            return equation(x, *args, **options)
        with torch.autocast(x.device.type, enabled=False):
            return equation(x, *args, **options)

    return run
