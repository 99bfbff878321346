"""``linear_reduce_scatter`` on Triton, as one kernel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.ops.sequence_ops import rank_by_rank
from pyparallel.ops.triton._fused_linear import fused_reason as reason  # noqa: F401
from pyparallel.ops.triton._fused_linear import matmul_scatter


def run(
    x_shard_k: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """``y_shard_s[..., S_r, M]`` of ``x_shard_k [..., S, K_r]``. No autograd."""
    lead = x_shard_k.shape[:-2]
    counts = [lead.numel() * size for size in sizes]
    y = matmul_scatter(rank_by_rank(x_shard_k, sizes), weight, bias, group, counts)
    return y.view(*lead, sizes[group.rank], weight.shape[0])
