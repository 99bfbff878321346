"""The overlapped linear layers on several GPUs: the plain path's bits, in and out of CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from pyparallel import backend
from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.comm.group import Group
from pyparallel.ops.all_gather_linear import gather_then_linear
from pyparallel.ops.cuda import _pipeline
from pyparallel.ops.linear_reduce_scatter import linear_then_reduce_scatter
from pyparallel.overlap.cuda_links import link_of, streams_of
from pyparallel.overlap.multiply import forward_linear
from pyparallel.overlap.pipelines import (
    Pipeline,
    Plan,
    all_gather_linear_backward_pipeline,
    all_gather_linear_pipeline,
    linear_reduce_scatter_backward_pipeline,
    linear_reduce_scatter_pipeline,
)
from tests.gpu.ranks import run_on_gpus, several, world_sizes

pytestmark = [pytest.mark.gpu, several]


def pipelines(c: NcclCommunicator, m: int, k: int, n: int, plan: Plan) -> list[Pipeline]:
    """All four on integers so small that every product and sum is exact in any order."""
    from pyparallel.native.cuda.ops import reduce_on_gpu

    generator = torch.Generator(device="cuda").manual_seed(c.rank)

    def integers(*shape: int) -> torch.Tensor:
        values = torch.randint(-2, 3, shape, generator=generator, device="cuda")
        return values.to(torch.bfloat16)

    own, link = plan.rows[c.rank], link_of(c)
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
        for transport in ("direct", "ring", *(["copy"] if c.peers is not None else [])):
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
    for op, tensor, parts in (
        ("all_gather_linear", x, gather_then_linear),
        ("linear_reduce_scatter", full, linear_then_reduce_scatter),
    ):
        with backend.use("cuda"):
            got = backend.call(op, tensor, weight, bias, group, sizes)
        with backend.use("torch"):
            want = parts(tensor, weight, bias, group, sizes)
        assert torch.equal(got, want), op


@pytest.mark.parametrize("size", world_sizes())
def test_layers_equal_the_plain_path(size) -> None:
    run_on_gpus(layers, size, 8192)


def copies_in_a_row(c: NcclCommunicator) -> None:
    """Calls back to back, of two kinds and growing sizes: nobody overwrites what a peer still reads."""
    assert c.peers is not None, "the GPUs of this machine do not address one another"
    streams = streams_of(c)
    for m in (64, 4096, 1000):
        rows = tuple(m // c.size + (r < m % c.size) for r in range(c.size))
        plain = pipelines(c, m, 256, 192, Plan(c.rank, rows, 0))
        for pipeline in plain:
            streams.run(pipeline)
        copied = []
        for _ in range(20):
            copied = pipelines(c, m, 256, 192, Plan(c.rank, rows, 1, "copy"))
            for pipeline in copied:
                streams.run(pipeline)
        torch.cuda.synchronize()
        for got, want in zip(copied, plain, strict=True):
            for a, b in zip(got.results, want.results, strict=True):
                assert torch.equal(a, b), m
    c.peers.check()


@pytest.mark.parametrize("size", world_sizes())
def test_copies_in_a_row(size) -> None:
    run_on_gpus(copies_in_a_row, size)


def triton_pieces(c: NcclCommunicator) -> None:
    """Real numbers: our kernel gives one shard's bits whole and in pieces, and the unfused path's."""
    group, sizes = Group.over(c), [1024] * c.size
    generator = torch.Generator(device="cuda").manual_seed(c.rank)
    x = torch.randn(1, 1024, 2048, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(512, 2048, generator=generator, device="cuda").bfloat16()
    with backend.use("triton"):
        want = gather_then_linear(x, weight, None, group, sizes)
    for pieces in (1, 2, 8):
        for transport in ("direct", *(["copy"] if c.peers is not None else [])):
            plan = Plan(c.rank, (1024,) * c.size, pieces, transport)
            how = {"plan": plan, "link": link_of(c), "linear": forward_linear("triton")}
            pipeline = all_gather_linear_pipeline(x[0], weight, **how)
            streams_of(c).run(pipeline)
            assert torch.equal(pipeline.results[0], want[0]), (pieces, transport)


def test_pieces_of_the_triton_kernel() -> None:
    run_on_gpus(triton_pieces, 2)


def registered(c: NcclCommunicator) -> int:
    """Buffers are registered at the first call, and are the same ones at the second."""
    x = torch.ones(64, 256, device="cuda")
    for _ in range(3):
        plan = Plan(c.rank, (64,) * c.size, 1)
        pipeline = all_gather_linear_pipeline(x, x, plan=plan, link=link_of(c))
        streams_of(c).run(pipeline)
    torch.cuda.synchronize()
    assert torch.equal(pipeline.results[0], torch.full((64 * c.size, 64), 256.0, device="cuda"))
    return len(c.windows.windows)


def test_buffers_are_registered() -> None:
    assert run_on_gpus(registered, 2) == [1, 1], "NCCL registered no symmetric window"


def chosen(c: NcclCommunicator) -> str:
    weight = torch.empty(3584, 8192, dtype=torch.bfloat16, device="cuda")
    plan, _ = _pipeline.plan_of("all_gather_linear", weight, Group.over(c), [2048] * c.size)
    return plan.transport


def test_gpus_of_one_machine_copy() -> None:
    assert run_on_gpus(chosen, 2) == ["copy", "copy"]


@pytest.mark.parametrize("transport", ["direct", "copy"])
def test_graph_capture(transport) -> None:
    run_on_gpus(captured, 2, transport)


def captured(c: NcclCommunicator, transport: str) -> None:
    rows = (256,) * c.size
    plan = Plan(c.rank, rows, 2, transport)
    x = torch.zeros(256, 256, dtype=torch.bfloat16, device="cuda")
    weight = torch.ones(128, 256, dtype=torch.bfloat16, device="cuda")
    streams, link = streams_of(c), link_of(c)
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
