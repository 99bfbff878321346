"""The peer kernels with all ranks on one GPU: a stream a rank, really at the same time, many epochs.

Needs neither NVLink nor a second GPU, so it is what one GPU can show of the protocol and its bits.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyparallel.comm.communicator import PeerError
from pyparallel.native.cuda import extension as cuda_extension
from pyparallel.native.cuda.extension import NCCL_TYPES
from tests.gpu.test_communicator import inputs, ordered_sum

pytestmark = pytest.mark.gpu
SLOT = 1 << 16
EPOCHS = 25


class Ranks:
    """A peer group of each rank over ordinary memory of this process."""

    def __init__(self, size: int, *, timeout_s: float = 20.0) -> None:
        extension = cuda_extension.load()
        group, num_bytes = extension.PeerGroup, extension.PeerGroup.segment_bytes(size, SLOT)
        self.segments = [
            torch.zeros(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(size)
        ]
        bases = [segment.data_ptr() for segment in self.segments]
        torch.cuda.synchronize()
        self.groups = [group("streams", rank, SLOT, timeout_s, bases) for rank in range(size)]
        self.streams = [torch.cuda.Stream() for _ in range(size)]
        self.algorithms, self.sum = extension.Algorithm, extension.Reduction.sum

    def finish(self) -> None:
        torch.cuda.synchronize()
        for group in self.groups:
            group.check()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 777, 1 << 14, 300_001])
def test_collectives_give_the_ordered_bits(size, dtype, n) -> None:
    # A kernel is loaded at its first launch, which waits for what runs; here that would wait for a peer
    # that this thread has not launched yet. One rank alone waits for nobody, and loads them all.
    for ranks in (1, size):
        collectives(ranks, dtype, n)


def collectives(size: int, dtype: torch.dtype, n: int) -> None:
    ranks, code = Ranks(size), NCCL_TYPES[dtype]
    element = torch.empty(0, dtype=dtype).element_size()
    data = inputs(size, n, dtype)
    total, mine = ordered_sum(data), [d.cuda() for d in data]
    counts = [n // size + (r < n % size) for r in range(size)]
    how = {"dtype": dtype, "device": "cuda"}
    for algorithm in (ranks.algorithms.one_shot, ranks.algorithms.two_shot):
        reduced = [[m.clone() for m in mine] for _ in range(EPOCHS)]
        parts = [torch.full((c,), torch.nan, **how) for c in counts]
        gathered = [torch.full((n,), torch.nan, **how) for _ in mine]
        swapped = [torch.full((c * size,), torch.nan, **how) for c in counts]
        torch.cuda.synchronize()
        for epoch in range(EPOCHS):
            for rank, group in enumerate(ranks.groups):
                stream, own = ranks.streams[rank].cuda_stream, [counts[rank]] * size
                x, part, whole = reduced[epoch][rank], parts[rank], gathered[rank]
                group.all_reduce(x.data_ptr(), n, code, ranks.sum, algorithm, stream)
                source = mine[rank].data_ptr()
                group.reduce_scatter(part.data_ptr(), source, counts, code, ranks.sum, stream)
                group.all_gather(whole.data_ptr(), part.data_ptr(), counts, element, stream)
                group.all_to_all(swapped[rank].data_ptr(), source, own, counts, element, stream)
                group.barrier(stream)
        ranks.finish()
        for rank in range(size):
            for epoch in range(EPOCHS):
                assert torch.equal(reduced[epoch][rank].cpu(), total), (rank, epoch)
            assert torch.equal(parts[rank].cpu(), total.split(counts)[rank])
            assert torch.equal(gathered[rank].cpu(), total)
            expected = torch.cat([d.split(counts)[rank] for d in data])
            assert torch.equal(swapped[rank].cpu(), expected)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_reduction_residual_and_norm(size, rows) -> None:
    for ranks in (1, size):
        fused(ranks, rows)


def fused(size: int, rows: int) -> None:
    from pyparallel.native.cuda import ops as cuda_ops

    hidden, dtype, ranks = 4096, torch.bfloat16, Ranks(size)
    data = [d.view(rows, hidden) for d in inputs(size, rows * hidden, dtype)]
    residual, weight = (t.cuda() for t in (torch.randn(rows, hidden), torch.randn(hidden)))
    residual, weight = residual.to(dtype), weight.to(dtype)
    _, want_h = cuda_ops.add_rms_norm(ordered_sum(data).cuda(), residual, weight, eps=1e-5)
    truth = F.rms_norm(want_h.double(), (hidden,), weight.double(), 1e-5)
    mine = [d.cuda() for d in data]
    torch.cuda.synchronize()
    for algorithm in (ranks.algorithms.one_shot, ranks.algorithms.two_shot):
        outs: list[tuple[Tensor, Tensor]] = [
            (torch.full_like(m, torch.nan), torch.full_like(m, torch.nan)) for m in mine
        ]
        torch.cuda.synchronize()
        for _ in range(EPOCHS):
            for rank, group in enumerate(ranks.groups):
                pointers = (mine[rank], residual, weight, *outs[rank])
                args = (*(t.data_ptr() for t in pointers), rows, hidden, 1e-5, NCCL_TYPES[dtype])
                group.all_reduce_norm(*args, algorithm, ranks.streams[rank].cuda_stream)
        ranks.finish()
        for h, y in outs:
            assert torch.equal(h, want_h)
            assert ((y.double() - truth).abs() <= 2**-7 * truth.abs() + 1e-6).all()


def test_graph_replay_keeps_the_epochs() -> None:
    for ranks in (1, 3):
        replayed(ranks)


def replayed(size: int) -> None:
    ranks = Ranks(size)
    xs = [torch.zeros(4096, device="cuda") for _ in range(size)]
    code, how = NCCL_TYPES[torch.float32], (ranks.sum, ranks.algorithms.two_shot)

    def call() -> None:
        current = torch.cuda.current_stream()
        for rank, group in enumerate(ranks.groups):
            stream = ranks.streams[rank]
            stream.wait_stream(current)
            group.all_reduce(xs[rank].data_ptr(), 4096, code, *how, stream.cuda_stream)
        for stream in ranks.streams:
            current.wait_stream(stream)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
        call()
    for step in range(10):
        for x in xs:
            x.fill_(1.0 + step)
        graph.replay()
        call()
        ranks.finish()
        for x in xs:
            assert torch.equal(x.cpu(), torch.full((4096,), (1.0 + step) * size**3))


def test_a_missing_rank_is_named() -> None:
    ranks, x = Ranks(2, timeout_s=0.5), torch.ones(64, device="cuda")
    how = (NCCL_TYPES[x.dtype], ranks.sum, ranks.algorithms.one_shot)
    ranks.groups[0].all_reduce(x.data_ptr(), 64, *how, ranks.streams[0].cuda_stream)
    torch.cuda.synchronize()
    with pytest.raises(PeerError, match="rank 1 died, or did not come within") as error:
        ranks.groups[0].check()
    assert str(error.value).startswith("all_reduce #1 of group 'streams' (rank 0 of 2)")
