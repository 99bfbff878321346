"""The replicated norms: torch's modules, computed by the backend's kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyparallel import autocast, backend
from pyparallel.comm.collectives import copy_to_group
from pyparallel.comm.group import Group


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last axis."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        _check_one_axis(self.normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        return backend.call("layer_norm", x, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` over the last axis."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        _check_one_axis(self.normalized_shape)

    def epsilon(self, x: Tensor) -> float:
        """What is added to the mean square; torch's own meaning of none is x's dtype's."""
        return torch.finfo(x.dtype).eps if self.eps is None else self.eps

    def forward(self, x: Tensor) -> Tensor:
        return backend.call("rms_norm", x, self.weight, self.epsilon(x))


def _check_one_axis(shape: tuple[int, ...]) -> None:
    if len(shape) != 1:
        raise ValueError(f"normalized_shape: expected the last axis alone, got {tuple(shape)}")


class HeadRMSNorm(RMSNorm):
    """``nn.RMSNorm`` over the features of heads that are cut over the group.

    The weight is shared by all heads, so its gradient is summed over the ranks.
    """

    def __init__(
        self,
        head_dim: int,
        eps: float,
        *,
        group: Group,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(head_dim, eps, device=device, dtype=dtype)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        weight = copy_to_group(self.weight, self.group)
        if autocast.is_on():
            # Heads come from a matmul, in its dtype; torch's norm takes one dtype.
            x = x.to(weight.dtype)
        return backend.call("rms_norm", x, weight, self.eps)
