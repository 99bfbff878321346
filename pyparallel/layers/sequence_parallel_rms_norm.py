"""``nn.RMSNorm`` on this rank's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyparallel import backend
from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.layers.norm import RMSNorm
from pyparallel.layers.owner import check_replaceable
from pyparallel.ops.gradients.shared_parameters import with_summed_gradients


class SequenceParallelRMSNorm(RMSNorm):
    """``y = x / sqrt(mean(x^2) + eps) * weight`` over the last axis of a sequence shard.

    The weight is replicated; each rank sees its tokens' part of the gradient.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as in ``nn.RMSNorm``; the last axis
            alone.
        group: the ranks that the sequence is cut over; torch's own objects are taken too.

    Shapes:
        x, y [..., S_r, H].

    Communication: none forward, one all-reduce backward.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: GroupLike,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.group = group_of(group)

    @classmethod
    def from_dense(cls, norm: nn.RMSNorm, *, group: GroupLike) -> SequenceParallelRMSNorm:
        """The parallel twin of ``norm``, with a copy of its weight."""
        check_replaceable(norm)
        affine = norm.weight is not None
        module = cls(
            norm.normalized_shape,
            norm.eps,
            affine,
            "meta",
            norm.weight.dtype if affine else None,
            group=group,
        )
        if affine:
            weight = norm.weight
            module.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        return module.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        (weight,) = with_summed_gradients(self.weight, group=self.group)
        return backend.call("rms_norm", x, weight, self.epsilon(x))
