"""``nn.Linear`` with its output features cut over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyparallel.comm.collectives import all_gather
from pyparallel.comm.group import Group
from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.comm.sequence import shard_sizes
from pyparallel.cut.shard import Sharding, features
from pyparallel.layers.parameters import ShardedModule, init_linear
from pyparallel.ops.all_gather_linear import all_gather_linear
from pyparallel.ops.column_parallel_linear import column_parallel_linear
from pyparallel.ops.gradients.replicated_parameter import sum_over_replicas
from pyparallel.ops.packed_linear import packed_linear


class ColumnParallelLinear(ShardedModule):
    """``y = x W^T + b`` with W's rows, so y's features, cut over the group.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``; dense sizes.
        group: the ranks; torch's own objects are taken too.
        gather_output: return the whole y on every rank instead of this rank's features.
        sharding: which output features each rank holds; by default the group's shares.
        replicas: where several ranks hold the same features: the local row from which on rows are
            replicas, and the sharding of those rows alone. Their gradients are summed over the ranks.
        sequence_parallel: x is this rank's tokens, and is gathered along the sequence.

    Shapes:
        x [..., K] replicated, or [..., S_r, K] with ``sequence_parallel``; y [..., M_r], or [..., M]
        with ``gather_output``.
        ``weight`` [M_r, K], ``bias`` [M_r].

    Communication: none forward (one all-gather with ``gather_output``); one all-reduce backward. With
    ``sequence_parallel`` one all-gather forward; one all-gather and one reduce-scatter backward.

    Raises:
        ValueError: ``gather_output`` with a sharding of several ranges a rank, or of replicas.
    """

    # x was gathered by several layers' common caller, who sums the gradients of their uses too.
    input_is_gathered = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: GroupLike,
        gather_output: bool = False,
        sharding: Sharding | None = None,
        replicas: tuple[int, Sharding] | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        group = group_of(group)
        super().__init__(group)
        sharding = sharding or features(out_features, group.shares)
        if gather_output and not sharding.in_order:
            raise ValueError(
                "gather_output: expected False, since the features of this sharding don't lie one "
                "rank after another; gather the parts of its output one by one"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.gather_output = gather_output
        self.replicas = replicas
        self.sequence_parallel = sequence_parallel
        self.add_shard("weight", (out_features, in_features), sharding, device, dtype)
        if bias:
            self.add_shard("bias", (out_features,), sharding, device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, group: GroupLike, **options) -> ColumnParallelLinear:
        """The parallel twin of ``linear``; ``options`` as in the constructor."""
        return cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            "meta",
            linear.weight.dtype,
            group=group,
            **options,
        ).load_dense(linear)

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear`` does: the same seed gives slices of the dense weights."""
        init_linear(self, self.in_features)

    def forward(
        self, x: Tensor, *, length: int | None = None, plus: Tensor | None = None
    ) -> Tensor:
        """Multiply.

        Args:
            length: S, with ``sequence_parallel``; by default all shards are as long as this one.
            plus: [..., M_r], added to this rank's features before any are gathered.
        """
        y = self._multiply(x, length)
        if plus is not None:
            y = (y + plus).to(y.dtype)
        if self.gather_output:
            sizes = self.shardings["weight"].sizes
            return all_gather(y, self.group, dim=-1, sizes=sizes, grad="split")
        return y

    def _multiply(self, x: Tensor, length: int | None) -> Tensor:
        """This rank's features."""
        weight, bias = self.weight, self.bias
        if (packed := self.packed) is not None:
            return packed_linear(x, packed, bias)
        if self.replicas is not None:
            first_row, sharding = self.replicas
            weight = sum_over_replicas(weight, sharding, self.group, first_row=first_row)
            if bias is not None:
                bias = sum_over_replicas(bias, sharding, self.group, first_row=first_row)
        if self.sequence_parallel:
            sizes = shard_sizes(x, length, self.group)
            return all_gather_linear(x, weight, bias, group=self.group, sizes=sizes)
        group = Group.single() if self.input_is_gathered else self.group
        return column_parallel_linear(x, weight, bias, group=group)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"local={self.weight.shape[0]}, bias={self.bias is not None}, {self.group}"
        )
