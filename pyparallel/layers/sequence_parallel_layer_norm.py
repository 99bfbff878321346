"""``nn.LayerNorm`` on this rank's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyparallel import backend
from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.layers.norm import LayerNorm
from pyparallel.layers.owner import check_replaceable
from pyparallel.ops.gradients.shared_parameters import with_summed_gradients


class SequenceParallelLayerNorm(LayerNorm):
    """``y = (x - mean) / sqrt(var + eps) * weight + bias`` over the last axis of a sequence shard.

    Weight and bias are replicated; each rank sees its tokens' part of their gradients.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in ``nn.LayerNorm``; the
            last axis alone.
        group: the ranks that the sequence is cut over; torch's own objects are taken too.

    Shapes:
        x, y [..., S_r, H].

    Communication: none forward; one all-reduce (weight and bias together) backward.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: GroupLike,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.group = group_of(group)

    @classmethod
    def from_dense(cls, norm: nn.LayerNorm, *, group: GroupLike) -> SequenceParallelLayerNorm:
        """The parallel twin of ``norm``, with copies of its parameters."""
        check_replaceable(norm)
        affine = norm.weight is not None
        module = cls(
            norm.normalized_shape,
            norm.eps,
            affine,
            norm.bias is not None,
            "meta",
            norm.weight.dtype if affine else None,
            group=group,
        )
        for name, parameter in norm.named_parameters(recurse=False):
            copy = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(module, name, copy)
        return module.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = with_summed_gradients(self.weight, self.bias, group=self.group)
        return backend.call("layer_norm", x, weight, bias, self.eps)
