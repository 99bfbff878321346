"""all_gather_linear on GPUs: the chunks of the gathered input are multiplied as they land."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.ops.cuda._pipeline import plan_of
from pyparallel.ops.cuda._pipeline import reason_against as reason  # noqa: F401
from pyparallel.ops.sequence_ops import join_tokens
from pyparallel.overlap.cuda_links import link_of, streams_of
from pyparallel.overlap.multiply import forward_linear
from pyparallel.overlap.pipelines import all_gather_linear_pipeline


def run(
    x_shard_s: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """y [..., S, N]: the chunks of the gathered input are multiplied as they land. No autograd.

    Args:
        x_shard_s: [..., S_r, K]. weight: [N, K]. bias: [N]. sizes: every rank's S_r.
    """
    lead = x_shard_s.shape[:-2]
    rows = [lead.numel() * size for size in sizes]
    plan, multiplier = plan_of("all_gather_linear", weight, group, rows)
    pipeline = all_gather_linear_pipeline(
        x_shard_s.reshape(-1, x_shard_s.shape[-1]),
        weight,
        plan=plan,
        link=link_of(group.communicator),
        linear=forward_linear(multiplier, bias),
    )
    streams_of(group.communicator).run(pipeline)
    return join_tokens(pipeline.results[0], lead, sizes)
