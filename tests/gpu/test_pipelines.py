"""The overlapped linear layers on several GPUs: the plain path's bits, in and out of CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from pyparallel import backend
from pyparallel.cuda_communicator import NcclCommunicator
from pyparallel.cuda_pipelines import NcclLink, reduce_on_gpu, streams_of
from pyparallel.group import Group
from pyparallel.overlap.pipelines import (
    Pipeline,
    Plan,
    all_gather_linear_backward_pipeline,
    all_gather_linear_pipeline,
    linear_reduce_scatter_backward_pipeline,
    linear_reduce_scatter_pipeline,
)

from .ranks import run_on_gpus, several, world_sizes

pytestmark = [pytest.mark.gpu, several]


def pipelines(c: NcclCommunicator, m: int, k: int, n: int, plan: Plan) -> list[Pipeline]:
    """All four on integers so small that every product and sum is exact in any order."""
    generator = torch.Generator(device="cuda").manual_seed(c.rank)

    def integers(*shape: int) -> torch.Tensor:
        values = torch.randint(-2, 3, shape, generator=generator, device="cuda")
        return values.to(torch.bfloat16)

    own, link = plan.rows[c.rank], NcclLink(c)
    x, full, weight = integers(own, k), integers(m, k), integers(n, k)
    dy, dy_full = integers(own, n), integers(m, n)
    summed = {"plan": plan, "link": link, "reduce": reduce_on_gpu}
    return [
        all_gather_linear_pipeline(x, weight, plan=plan, link=link),
        linear_reduce_scatter_pipeline(full, weight, **summed),
        all_gather_linear_backward_pipeline(dy_full, x, weight, **summed),
        linear_reduce_scatter_backward_pipeline(dy, full, weight, plan=plan, link=link),
    ]


def same_bits(c: NcclCommunicator, m: int) -> None:
    rows = tuple(m // c.size + (r < m % c.size) for r in range(c.size))
    streams = streams_of(c)
    plain: list[torch.Tensor] = []
    for pieces in (0, 1, 2, 4):
        for transport in ("direct", "ring"):
            plan = Plan(c.rank, rows, pieces, transport)
            results = []
            for pipeline in pipelines(c, m, 256, 192, plan):
                streams.run(pipeline)
                results += pipeline.results
            torch.cuda.synchronize()
            plain = plain or results
            for got, want in zip(results, plain, strict=True):
                assert torch.equal(got, want), (pieces, transport)


@pytest.mark.parametrize("size", world_sizes())
@pytest.mark.parametrize("m", [16, 1000, 4096])
def test_same_bits_for_any_pieces(size, m) -> None:
    run_on_gpus(same_bits, size, m)


def layers(c: NcclCommunicator, tokens: int) -> None:
    """Real numbers, whole shards as chunks: cuBLASLt's bits on both paths."""
    group = Group.over(c)
    generator = torch.Generator(device="cuda").manual_seed(c.rank)
    sizes = [tokens // c.size] * c.size
    x = torch.randn(1, sizes[c.rank], 1024, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(512, 1024, generator=generator, device="cuda").bfloat16()
    bias = torch.randn(512, generator=generator, device="cuda").bfloat16()
    full = torch.randn(1, tokens, 1024, generator=generator, device="cuda").bfloat16()
    for op, tensor in (("all_gather_linear", x), ("linear_reduce_scatter", full)):
        with backend.use("cuda"):
            got = backend.call(op, tensor, weight, bias, group, sizes)
        with backend.use("torch"):
            want = backend.call(op, tensor, weight, bias, group, sizes)
        assert torch.equal(got, want), op


@pytest.mark.parametrize("size", world_sizes())
def test_layers_equal_the_plain_path(size) -> None:
    run_on_gpus(layers, size, 8192)


def captured(c: NcclCommunicator) -> None:
    rows = (256,) * c.size
    plan = Plan(c.rank, rows, 2)
    x = torch.zeros(256, 256, dtype=torch.bfloat16, device="cuda")
    weight = torch.ones(128, 256, dtype=torch.bfloat16, device="cuda")
    streams, link = streams_of(c), NcclLink(c)
    streams.run(all_gather_linear_pipeline(x, weight, plan=plan, link=link))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pipeline = all_gather_linear_pipeline(x, weight, plan=plan, link=link)
        streams.run(pipeline)
    for step in range(3):
        x.fill_(float(c.rank + step))
        graph.replay()
        torch.cuda.synchronize()
        for rank, part in enumerate(pipeline.results[0].split(256)):
            assert torch.equal(part, torch.full_like(part, 256.0 * (rank + step)))


def test_graph_capture() -> None:
    run_on_gpus(captured, 2)
