"""``nn.Linear`` with its input features cut over the ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyparallel import autocast, backend
from pyparallel.comm.collectives import all_reduce, all_reduce_raw, reduce_scatter, split
from pyparallel.comm.group import Group
from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.comm.sequence import sequence_sizes
from pyparallel.cut.shard import REPLICATED, Sharding, features
from pyparallel.layers.norm import RMSNorm
from pyparallel.layers.owner import is_touched
from pyparallel.layers.parameters import ShardedModule, init_linear
from pyparallel.ops.column_parallel_linear import column_parallel_linear
from pyparallel.ops.gradients.shared_parameters import with_summed_gradients
from pyparallel.ops.linear_reduce_scatter import linear_reduce_scatter
from pyparallel.ops.packed_linear import packed_linear
from pyparallel.ops.row_parallel_linear import row_parallel_linear


class RowParallelLinear(ShardedModule):
    """``y = x W^T + b`` with W's columns, so x's features, cut over the group.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``; dense sizes.
        group: the ranks; torch's own objects are taken too.
        input_is_parallel: x is this rank's features already; else it is whole and is cut here.
        sharding: which input features (axis 1) each rank holds; by default the group's shares.
        sequence_parallel: y is this rank's tokens.

    Shapes:
        x [..., K_r], or [..., K] without ``input_is_parallel``; y [..., M] replicated, or
        [..., S_r, M] with ``sequence_parallel``.
        ``weight`` [M, K_r], ``bias`` [M], which is added once, after the reduction.

    Communication: one all-reduce forward; none backward (one all-gather without
    ``input_is_parallel``). With ``sequence_parallel`` one reduce-scatter forward, one all-gather
    backward.

    Raises:
        ValueError: forward, with ``sequence_parallel``, of fewer tokens than ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: GroupLike,
        input_is_parallel: bool = True,
        sharding: Sharding | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        group = group_of(group)
        super().__init__(group)
        sharding = sharding or features(in_features, group.shares, dim=1)
        self.in_features = in_features
        self.out_features = out_features
        self.input_is_parallel = input_is_parallel
        self.sequence_parallel = sequence_parallel
        self.add_shard("weight", (out_features, in_features), sharding, device, dtype)
        if bias:
            self.add_shard("bias", (out_features,), REPLICATED, device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, group: GroupLike, **options) -> RowParallelLinear:
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

    def forward(self, x: Tensor, *, plus: Tensor | None = None) -> Tensor:
        """Multiply.

        Args:
            plus: [..., M], this rank's part of a sum over the ranks that joins the reduction.
        """
        if not self.input_is_parallel:
            x = split(x, self.group, dim=-1, sizes=self.shardings["weight"].sizes)
        if (packed := self.packed) is not None:
            y = packed_linear(x, packed)
            y = y if plus is None else (y + plus).to(y.dtype)
            y = all_reduce_raw(y, self.group) if self.group.size > 1 else y
            return y if self.bias is None else y + self.bias
        if plus is not None:
            sequence = self.sequence_parallel
            return multiply_and_sum(x, self.weight, self.bias, plus, self.group, sequence)
        if self.sequence_parallel:
            sizes = sequence_sizes(x.shape[-2], self.group)
            return linear_reduce_scatter(x, self.weight, self.bias, group=self.group, sizes=sizes)
        return row_parallel_linear(x, self.weight, self.bias, group=self.group)

    def add_and_norm(self, x: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """``(norm(h), h)`` with ``h = residual + self(x)``: reduction, addition and norm in one where a
        backend has a kernel for that."""
        plain = self.bias is None and self.input_is_parallel and not self.sequence_parallel
        plain = plain and not is_touched(self) and not is_touched(norm)
        # Autocast multiplies in another dtype than it adds and norms in.
        one_dtype = x.dtype == residual.dtype == self.dtype and not autocast.is_on()
        if plain and one_dtype and type(norm) is RMSNorm and norm.weight is not None:
            rest = residual, norm.weight, norm.epsilon(x), self.group
            run = backend.offered("all_reduce_residual_rms_norm", residual, *rest)
            if run is not None and (packed := self.packed) is not None:
                return run(packed_linear(x, packed), *rest)
            if run is not None:
                return run(backend.call("linear", x, self.weight), *rest)
        h = residual + self(x)
        return norm(h), h

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"local={self.weight_shape[1]}, bias={self.bias is not None}, {self.group}"
        )


def multiply_and_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plus: Tensor,
    group: Group,
    sequence_parallel: bool,
) -> Tensor:
    """``y = sum over ranks of (x_shard_k w_shard_k^T + plus) + b``, in one reduction.

    Args:
        x: [..., K_r]. weight: [M, K_r]. bias: [M]. plus: [..., M].
        sequence_parallel: y is this rank's tokens.
    """
    product = column_parallel_linear(x, weight, group=Group.single())
    y = product + plus
    if sequence_parallel:
        # The bias sees this rank's tokens.
        (bias,) = with_summed_gradients(bias, group=group)
        y = reduce_scatter(y, group, dim=-2, sizes=sequence_sizes(y.shape[-2], group))
    else:
        y = all_reduce(y, group)
    y = y if bias is None else y + bias
    return y.to(product.dtype)
