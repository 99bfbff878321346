"""The query, key and value projections as one matmul, cut by heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyparallel.comm.group_of import GroupLike, group_of
from pyparallel.cut.shard import HeadLayout, fuse
from pyparallel.layers.column_parallel_linear import ColumnParallelLinear
from pyparallel.layers.owner import join_dense


class QKVParallelLinear(ColumnParallelLinear):
    """``[q, k, v] = x W^T + b`` with this rank's heads of each.

    The dense W stores all query heads' rows, then all key heads', then all value heads'. With fewer KV
    heads than ranks, KV heads are replicated and their gradients summed over the replicas.

    Args:
        embed_dim: features of x.
        num_heads, num_kv_heads: dense head counts; by default as many KV heads as query heads.
        head_dim: D; by default ``embed_dim // num_heads``.
        bias, device, dtype: as in ``nn.Linear``.
        group: the ranks; torch's own objects are taken too.
        sequence_parallel: x is this rank's tokens, and is gathered along the sequence.

    Shapes:
        x [..., K], or [..., S_r, K] with ``sequence_parallel``; returns q [..., N_r, D], k and v
        [..., G_r, D].
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: GroupLike,
        sequence_parallel: bool = False,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None:
            if embed_dim % num_heads:
                raise ValueError(
                    f"embed_dim: expected a multiple of num_heads={num_heads}, got {embed_dim}; "
                    f"or give head_dim="
                )
            head_dim = embed_dim // num_heads
        group = group_of(group)
        layout = HeadLayout.of(num_heads, num_kv_heads, group.shares)
        replicas = None
        if layout.replicated:
            start, stop = layout.query[group.rank]
            kv = layout.kv_sharding(head_dim)
            replicas = ((stop - start) * head_dim, fuse(kv, kv))
        super().__init__(
            embed_dim,
            (num_heads + 2 * num_kv_heads) * head_dim,
            bias,
            device,
            dtype,
            group=group,
            sharding=layout.qkv_sharding(head_dim),
            replicas=replicas,
            sequence_parallel=sequence_parallel,
        )
        self.layout = layout
        self.head_dim = head_dim

    @classmethod
    def from_dense(
        cls,
        query: nn.Linear,
        key: nn.Linear,
        value: nn.Linear,
        *,
        head_dim: int,
        group: GroupLike,
        sequence_parallel: bool = False,
    ) -> QKVParallelLinear:
        """The parallel twin of three projections that read the same x."""
        parts = (query, key, value)
        dense = join_dense(parts, ("query", "key", "value"))
        module = cls(
            query.in_features,
            query.out_features // head_dim,
            key.out_features // head_dim,
            head_dim,
            query.bias is not None,
            "meta",
            query.weight.dtype,
            group=group,
            sequence_parallel=sequence_parallel,
        )
        module.load_dense(dense)
        return module.train(query.training)

    def forward(self, x: Tensor, *, length: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        heads = super().forward(x, length=length).unflatten(-1, (-1, self.head_dim))
        rank = self.group.rank
        num_query = self.layout.query[rank][1] - self.layout.query[rank][0]
        num_kv = self.layout.kv[rank][1] - self.layout.kv[rank][0]
        return heads.split([num_query, num_kv, num_kv], -2)
