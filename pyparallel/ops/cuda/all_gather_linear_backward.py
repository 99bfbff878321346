"""The gradients of all_gather_linear on GPUs: x is gathered under dgrad, dx travels under wgrad."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.native.cuda.ops import reduce_on_gpu
from pyparallel.ops.cuda._pipeline import backward_reason as reason  # noqa: F401
from pyparallel.ops.cuda._pipeline import plan_of
from pyparallel.ops.sequence_ops import rank_by_rank
from pyparallel.overlap.cuda_links import link_of, streams_of
from pyparallel.overlap.multiply import backward_linear
from pyparallel.overlap.pipelines import all_gather_linear_backward_pipeline


def run(
    grad: Tensor,
    x_shard_s: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dx [..., S_r, K] and dw [N, K]: the input is gathered under dgrad, dx travels under wgrad."""
    rows = [x_shard_s.shape[:-2].numel() * size for size in sizes]
    plan, multiplier = plan_of("all_gather_linear", weight, group, rows)
    pipeline = all_gather_linear_backward_pipeline(
        rank_by_rank(grad, sizes),
        x_shard_s.reshape(-1, x_shard_s.shape[-1]),
        weight,
        plan=plan,
        link=link_of(group.communicator),
        linear=backward_linear(multiplier),
        reduce=reduce_on_gpu,
    )
    streams_of(group.communicator).run(pipeline)
    dx, dw = pipeline.results
    return dx.view(x_shard_s.shape), dw
