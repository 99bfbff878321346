"""linear_reduce_scatter on GPUs: partial sums travel while the next ones are multiplied."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.native.cuda.ops import reduce_on_gpu
from pyparallel.ops.cuda._pipeline import plan_of
from pyparallel.ops.cuda._pipeline import reason_against as reason  # noqa: F401
from pyparallel.ops.sequence_ops import rank_by_rank
from pyparallel.overlap.cuda_links import link_of, streams_of
from pyparallel.overlap.multiply import forward_linear
from pyparallel.overlap.pipelines import linear_reduce_scatter_pipeline


def run(
    x_shard_k: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """y [..., S_r, N]: partial sums travel while the next ones are multiplied. No autograd.

    Args:
        x_shard_k: [..., S, K_r]. weight: [N, K_r]. bias: [N], added once. sizes: every rank's S_r.
    """
    lead, width = x_shard_k.shape[:-2], weight.shape[0]
    rows = [lead.numel() * size for size in sizes]
    plan, multiplier = plan_of("linear_reduce_scatter", weight, group, rows)
    pipeline = linear_reduce_scatter_pipeline(
        rank_by_rank(x_shard_k, sizes),
        weight,
        plan=plan,
        link=link_of(group.communicator),
        linear=forward_linear(multiplier),
        reduce=reduce_on_gpu,
    )
    streams_of(group.communicator).run(pipeline)
    y = pipeline.results[0].view(*lead, sizes[group.rank], width)
    return y if bias is None else y.add_(bias)
