"""The pipelines with our Triton matmul: any number of pieces has the bits of the unfused Triton path."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from bench.overlap.simulate import run_ranks
from pyparallel.kernels.configurations import FEW_ROWS, matmul_config
from pyparallel.kernels.matmul import matmul_descriptor
from pyparallel.kernels.matmul.matmul import matmul
from pyparallel.overlap.actions import rank_ordered_sum
from pyparallel.overlap.links import Mailbox
from pyparallel.overlap.multiply import (
    MOST_THIN_ROWS,
    backward_linear,
    forward_linear,
    reason_against_triton,
)
from pyparallel.overlap.pipelines import (
    Linear,
    Plan,
    all_gather_linear_pipeline,
    linear_reduce_scatter_backward_pipeline,
    linear_reduce_scatter_pipeline,
)

ROWS, K, N = (MOST_THIN_ROWS + 1, 280), 40, 24
# The interpreter runs one program of one kernel at a time.
one_at_a_time = threading.Lock()


def guarded(linear: Linear) -> Linear:
    def run(rows: Tensor, weight: Tensor, out: Tensor) -> None:
        with one_at_a_time:
            linear(rows, weight, out)

    return run


def randn(*shape: int, seed: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16().to(device)


def run(build, pieces: int, transport: str) -> list[tuple[Tensor, ...]]:
    box = Mailbox(len(ROWS), timeout=120.0)
    pipelines = [
        build(r, plan=Plan(r, ROWS, pieces, transport), link=box.link(r)) for r in range(len(ROWS))
    ]
    run_ranks(pipelines, box, seed=pieces, max_delay=0.0)
    return [p.results for p in pipelines]


def test_pieces_have_the_bits_of_the_unfused_kernel(device: str) -> None:
    bias, total = randn(N, seed=9, device=device), sum(ROWS)
    x = [randn(rows, K, seed=r, device=device) for r, rows in enumerate(ROWS)]
    full = [randn(total, K, seed=20 + r, device=device) for r in range(2)]
    weight = [randn(N, K, seed=10 + r, device=device) for r in range(2)]
    dy = [randn(rows, N, seed=30 + r, device=device) for r, rows in enumerate(ROWS)]

    def gather(r: int, **how):
        linear = guarded(forward_linear("triton", bias))
        return all_gather_linear_pipeline(x[r], weight[r], linear=linear, **how)

    def scatter(r: int, **how):
        linear = guarded(forward_linear("triton"))
        return linear_reduce_scatter_pipeline(full[r], weight[r], linear=linear, **how)

    def back(r: int, **how):
        linear = guarded(backward_linear("triton"))
        return linear_reduce_scatter_backward_pipeline(
            dy[r], full[r], weight[r], linear=linear, **how
        )

    # The unfused path on the backend triton: a matmul for each rank's shard, nothing in pieces.
    want_gather = [torch.cat([matmul(s, w, bias=bias) for s in x]) for w in weight]
    parts = [[matmul(s, w) for s in f.split(ROWS)] for f, w in zip(full, weight, strict=True)]
    want_scatter = []
    for r in range(2):
        out = torch.empty(ROWS[r], N, dtype=torch.bfloat16, device=device)
        rank_ordered_sum(torch.stack([parts[q][r] for q in range(2)]), out)
        want_scatter.append(out)
    want_back = [torch.cat([matmul(d, w.t()) for d in dy]) for w in weight]
    for build, want in ((gather, want_gather), (scatter, want_scatter), (back, want_back)):
        for pieces, transport in ((0, "direct"), (3, "direct"), (2, "copy")):
            for r, results in enumerate(run(build, pieces, transport)):
                assert torch.equal(results[0], want[r]), (build.__name__, pieces, r)


def test_the_tiles_do_not_depend_on_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compiled, where few rows would have tiles of their own and split K."""
    seen = []
    monkeypatch.setattr(matmul_descriptor, "architecture", lambda x: "sm_90")
    monkeypatch.setattr(
        matmul_descriptor, "matmul_out", lambda *args, config, **options: seen.append(config)
    )
    k = 4096
    for rows in (1, 16, 20, 64, 256, 257, 4096):
        x, weight = torch.empty(rows, k).bfloat16(), torch.empty(N, k).bfloat16()
        forward_linear("triton")(x, weight, torch.empty(rows, N).bfloat16())
    wanted = matmul_config("sm_90", 4096, N, k, 2)
    assert seen == [wanted] * 7
    few = [matmul_config("sm_90", rows, N, k, 2) for rows in (16, FEW_ROWS)]
    assert wanted not in few


def test_both_files_mean_the_same_by_few_rows() -> None:
    assert MOST_THIN_ROWS == FEW_ROWS


def test_few_rows_are_left_to_the_library() -> None:
    """A shard in pieces of few rows keeps the tiles of many; a shard of few rows does not qualify."""
    like = torch.empty(0, dtype=torch.bfloat16)
    assert reason_against_triton(like, (MOST_THIN_ROWS + 1,)) is None
    assert "rows has the tiles for few rows" in reason_against_triton(like, (MOST_THIN_ROWS,))
    assert "float32" in reason_against_triton(like.float(), (4096,))
