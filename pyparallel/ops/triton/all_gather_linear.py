"""``all_gather_linear`` on Triton, as one kernel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.ops.sequence_ops import join_tokens
from pyparallel.ops.triton._fused_linear import fused_reason as reason  # noqa: F401
from pyparallel.ops.triton._fused_linear import gather_matmul


def run(
    x_shard_s: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """``y_shard_m[..., S, M_r]`` of ``x_shard_s [..., S_r, K]``. No autograd."""
    lead = x_shard_s.shape[:-2]
    counts = [lead.numel() * size for size in sizes]
    x = x_shard_s.reshape(-1, x_shard_s.shape[-1])
    return join_tokens(gather_matmul(x, weight, bias, group, counts)[0], lead, sizes)
