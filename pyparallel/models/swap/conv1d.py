"""transformers' ``Conv1D``, a linear layer whose weight lies transposed [K, M], cut over the ranks.

Legend: K input features, M output features, K_r and M_r this rank's. The weight keeps the layout that
GPT-2's checkpoints have, so a rank reads its slices as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyparallel.comm.group import Group
from pyparallel.comm.sequence import sequence_sizes
from pyparallel.cut.shard import REPLICATED, Sharding
from pyparallel.layers.parameters import ShardedModule
from pyparallel.layers.row_parallel_linear import multiply_and_sum
from pyparallel.ops.column_parallel_linear import column_parallel_linear
from pyparallel.ops.linear_reduce_scatter import linear_reduce_scatter
from pyparallel.ops.row_parallel_linear import row_parallel_linear


class ColumnParallelConv1D(ShardedModule):
    """``y = x W + b`` with W's columns, so y's features, cut over the group.

    Args:
        nf, nx: M and K, as in ``Conv1D``; dense sizes.
        device, dtype: of the parameters, which are left uninitialised.
        group: the ranks.
        sharding: which output features each rank holds.

    Shapes:
        x [..., K] replicated; y [..., M_r]. ``weight`` [K, M_r], ``bias`` [M_r].

    Communication: none forward; one all-reduce backward, none where ``input_is_gathered``.
    """

    input_is_gathered = False

    def __init__(
        self,
        nf: int,
        nx: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group,
        sharding: Sharding,
    ) -> None:
        super().__init__(group)
        self.nf = nf
        self.nx = nx
        self.add_shard("weight", (nx, nf), sharding.along(1), device, dtype)
        self.add_shard("bias", (nf,), sharding.along(0), device, dtype)

    @classmethod
    def from_dense(
        cls, conv: nn.Module, *, group: Group, sharding: Sharding
    ) -> ColumnParallelConv1D:
        """The parallel twin of ``conv``."""
        twin = cls(conv.nf, conv.nx, "meta", conv.weight.dtype, group=group, sharding=sharding)
        return twin.load_dense(conv)

    def forward(self, x: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """Multiply; ``plus [..., M_r]`` is added to this rank's features."""
        group = Group.single() if self.input_is_gathered else self.group
        y = column_parallel_linear(x, self.weight.t(), self.bias, group=group)
        return y if plus is None else (y + plus).to(y.dtype)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, local={self.weight.shape[1]}, {self.group}"


class RowParallelConv1D(ShardedModule):
    """``y = x W + b`` with W's rows, so x's features, cut over the group.

    Args:
        nf, nx: M and K, as in ``Conv1D``; dense sizes.
        device, dtype: of the parameters, which are left uninitialised.
        group: the ranks.
        sharding: which input features each rank holds.

    Shapes:
        x [..., K_r]; y [..., M] replicated. ``weight`` [K_r, M], ``bias`` [M], added once.

    Communication: one all-reduce forward; none backward. With ``sequence_parallel`` y is this rank's
    tokens: one reduce-scatter forward, one all-gather backward.
    """

    sequence_parallel = False

    def __init__(
        self,
        nf: int,
        nx: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group,
        sharding: Sharding,
    ) -> None:
        super().__init__(group)
        self.nf = nf
        self.nx = nx
        self.add_shard("weight", (nx, nf), sharding.along(0), device, dtype)
        self.add_shard("bias", (nf,), REPLICATED, device, dtype)

    @classmethod
    def from_dense(cls, conv: nn.Module, *, group: Group, sharding: Sharding) -> RowParallelConv1D:
        """The parallel twin of ``conv``."""
        twin = cls(conv.nf, conv.nx, "meta", conv.weight.dtype, group=group, sharding=sharding)
        return twin.load_dense(conv)

    def forward(self, x: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """Multiply; ``plus [..., M]``, this rank's part of a sum over the ranks, joins the reduction."""
        weight = self.weight.t()
        if plus is not None:
            sequence = self.sequence_parallel
            return multiply_and_sum(x, weight, self.bias, plus, self.group, sequence)
        if self.sequence_parallel:
            sizes = sequence_sizes(x.shape[-2], self.group)
            return linear_reduce_scatter(x, weight, self.bias, group=self.group, sizes=sizes)
        return row_parallel_linear(x, weight, self.bias, group=self.group)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, local={self.weight.shape[0]}, {self.group}"
