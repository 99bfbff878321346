"""The gradients of linear_reduce_scatter on GPUs: chunks of dy are multiplied as they land."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.ops.cuda._pipeline import backward_reason as reason  # noqa: F401
from pyparallel.ops.cuda._pipeline import plan_of
from pyparallel.ops.linear import bias_grad
from pyparallel.ops.sequence_ops import join_tokens, rank_by_rank
from pyparallel.overlap.cuda_links import link_of, streams_of
from pyparallel.overlap.multiply import backward_linear
from pyparallel.overlap.pipelines import linear_reduce_scatter_backward_pipeline


def run(
    grad: Tensor,
    x_shard_k: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [..., S, K_r], dw [N, K_r], db [N]: chunks of the gradient are multiplied as they land."""
    lead, columns = grad.shape[:-2], grad.shape[-1]
    plan, multiplier = plan_of(
        "linear_reduce_scatter", weight, group, [lead.numel() * size for size in sizes]
    )
    pipeline = linear_reduce_scatter_backward_pipeline(
        grad.reshape(-1, columns),
        rank_by_rank(x_shard_k, sizes),
        weight,
        plan=plan,
        link=link_of(group.communicator),
        linear=backward_linear(multiplier),
    )
    streams_of(group.communicator).run(pipeline)
    dx, dw = pipeline.results
    db = bias_grad(pipeline.views["gathered"]()) if needs[2] else None
    return join_tokens(dx, lead, sizes), dw, db
