"""The schedules over the shared-memory engine: ranks are processes, streams threads, delays random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.overlap.simulate import run_rank
from pyparallel.comm.group import Group
from pyparallel.overlap.links import CommunicatorLink
from pyparallel.overlap.pipelines import (
    Plan,
    all_gather_linear_backward_pipeline,
    all_gather_linear_pipeline,
    linear_reduce_scatter_backward_pipeline,
    linear_reduce_scatter_pipeline,
)
from pyparallel.testing import run_ranks

K, N = 12, 9


def by_rows(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    out.copy_((rows.double().unsqueeze(1) * weight.double()).sum(-1))


def by_rows_plain(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    by_rows(rows, weight.t(), out)


def one_rank(group: Group, pieces: tuple[int, ...]) -> list[list[Tensor]]:
    """Results of all pipelines for each number of pieces; every rank rebuilds all data by seed."""
    rows = tuple((5 * r + 3) % 8 for r in range(group.size))
    generator = torch.Generator().manual_seed(100 + group.rank)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    own, total = rows[group.rank], sum(rows)
    x_shard_m, x_full, weight = randn(own, K), randn(total, K), randn(N, K)
    dy_shard_m, dy_full = randn(own, N), randn(total, N)
    link = CommunicatorLink(group.communicator)
    results = []
    # Over the engine too every number of pieces goes both ways: messages, and copies in place.
    plans = [Plan(group.rank, rows, count) for count in pieces]
    plans += [Plan(group.rank, rows, count, "copy") for count in pieces if count]
    for plan in plans:
        forward = {"plan": plan, "link": link, "linear": by_rows}
        backward = {"plan": plan, "link": link, "linear": by_rows_plain}
        pipelines = [
            all_gather_linear_pipeline(x_shard_m, weight, **forward),
            linear_reduce_scatter_pipeline(x_full, weight, **forward),
            all_gather_linear_backward_pipeline(dy_full, x_shard_m, weight, **backward),
            linear_reduce_scatter_backward_pipeline(dy_shard_m, x_full, weight, **backward),
        ]
        for pipeline in pipelines:
            run_rank(pipeline, seed=plan.pieces, max_delay=5e-4)
        results.append([t for pipeline in pipelines for t in pipeline.results])
    return results


@pytest.mark.parametrize("size", [2, 3, 4])
def test_same_bits_over_the_engine(size: int) -> None:
    for plain, *overlapped in run_ranks(one_rank, size, (0, 1, 3)):
        for other in overlapped:
            for tensor, want in zip(other, plain, strict=True):
                assert torch.isfinite(want).all()
                assert torch.equal(tensor, want)


@pytest.mark.slow
@pytest.mark.parametrize("size", [5, 6, 7, 8])
def test_same_bits_over_the_engine_with_more_ranks(size: int) -> None:
    for plain, *overlapped in run_ranks(one_rank, size, (0, 1, 2, 5)):
        for other in overlapped:
            for tensor, want in zip(other, plain, strict=True):
                assert torch.equal(tensor, want)
