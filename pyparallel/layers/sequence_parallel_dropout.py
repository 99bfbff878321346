"""``nn.Dropout`` on this rank's tokens, with the mask of the whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.comm.sequence import shard_sizes
from pyparallel.layers.owner import check_replaceable
from pyparallel.ops.dropout import dropout


class SequenceParallelDropout(nn.Module):
    """Dropout of [..., S, H] whose mask does not depend on how many ranks the sequence is cut over.

    Every call takes a new seed from torch's CPU generator, which must be in the same state on all
    ranks: :func:`torch.manual_seed` with one seed, or :func:`pyparallel.parallelize`, sees to that.

    Args:
        p, inplace: as in ``nn.Dropout``; ``inplace`` must be False.
        group: the ranks that the sequence is cut over; torch's own objects are taken too.

    Shapes:
        x, y [..., S_r, H].

    Communication: none.

    Raises:
        ValueError: p is not in [0, 1], or ``inplace``.
    """

    def __init__(self, p: float = 0.5, inplace: bool = False, *, group: GroupLike) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p: expected 0 <= p <= 1, got {p}")
        if inplace:
            raise ValueError(
                "inplace: expected False; backward needs the input of what came before"
            )
        self.p = p
        self.group = group_of(group)

    @classmethod
    def from_dense(cls, module: nn.Dropout, *, group: GroupLike) -> SequenceParallelDropout:
        """The parallel twin of ``module``."""
        check_replaceable(module)
        return cls(module.p, module.inplace, group=group).train(module.training)

    def forward(self, x: Tensor, *, length: int | None = None) -> Tensor:
        """Drop elements, in training.

        Args:
            length: S; by default all shards are as long as this one.
        """
        if not self.training or self.p == 0.0:
            return x
        sizes = shard_sizes(x, length, self.group)
        seed = torch.randint(-(2**63), 2**63 - 1, (), device="cpu")
        start = sum(sizes[: self.group.rank])
        return dropout(x, self.p, seed=seed, length=sum(sizes), start=start)

    def extra_repr(self) -> str:
        return f"p={self.p}, {self.group}"
