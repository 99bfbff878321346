"""The peer-memory kernels on GPUs that address each other: the ordered bits, many epochs, graphs,
faults, and the fused all-reduce + norm."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pyparallel.comm.communicator import PeerError
from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.native.cuda import extension as cuda_extension
from pyparallel.native.cuda.extension import NCCL_TYPES
from tests.gpu.ranks import run_on_gpus, several, world_sizes
from tests.gpu.test_communicator import inputs, ordered_sum

pytestmark = [pytest.mark.gpu, several]
SLOT = 1 << 18


class Peers:
    """A peer group over CUDA IPC, made through the communicator's store."""

    def __init__(self, c: NcclCommunicator, *, timeout_s: float = 10.0) -> None:
        extension = cuda_extension.load()
        group = extension.PeerGroup
        self.segments = extension.IpcSegments(group.segment_bytes(c.size, SLOT))
        c.store.set(f"test_segment/{c.rank}", self.segments.handle())
        handles = [c.store.get(f"test_segment/{r}") for r in range(c.size)]
        bases = self.segments.open(c.rank, handles)
        self.group = group("peers", c.rank, SLOT, timeout_s, bases)
        self.algorithms = extension.Algorithm
        self.reductions = extension.Reduction
        c.barrier()


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def collectives(c: NcclCommunicator, dtype: torch.dtype, n: int) -> None:
    peers, code = Peers(c), NCCL_TYPES[dtype]
    element = torch.empty(0, dtype=dtype).element_size()
    data = inputs(c.size, n, dtype)
    total, mine = ordered_sum(data), data[c.rank].cuda()
    counts = [n // c.size + (r < n % c.size) for r in range(c.size)]
    for _ in range(7):
        for algorithm in (peers.algorithms.one_shot, peers.algorithms.two_shot):
            x = mine.clone()
            peers.group.all_reduce(x.data_ptr(), n, code, peers.reductions.sum, algorithm, stream())
            assert torch.equal(x.cpu(), total)
        part = torch.empty(counts[c.rank], dtype=dtype, device="cuda")
        args = (part.data_ptr(), mine.data_ptr(), counts, code, peers.reductions.sum, stream())
        peers.group.reduce_scatter(*args)
        gathered = torch.empty(n, dtype=dtype, device="cuda")
        args = (gathered.data_ptr(), part.data_ptr(), counts, element, stream())
        peers.group.all_gather(*args)
        assert torch.equal(gathered.cpu(), total)
        received = torch.empty(counts[c.rank] * c.size, dtype=dtype, device="cuda")
        own = [counts[c.rank]] * c.size
        args = (received.data_ptr(), mine.data_ptr(), own, counts, element, stream())
        peers.group.all_to_all(*args)
        assert torch.equal(received.cpu(), torch.cat([d.split(counts)[c.rank] for d in data]))
        peers.group.barrier(stream())
    peers.group.check()
    c.barrier()


@pytest.mark.parametrize("size", world_sizes())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 777, 1 << 14, 3_000_001])
def test_collectives_give_the_ordered_bits(size, dtype, n) -> None:
    run_on_gpus(collectives, size, dtype, n)


def fused(c: NcclCommunicator, rows: int, hidden: int) -> None:
    from pyparallel.native.cuda import ops as cuda_ops

    peers, dtype = Peers(c), torch.bfloat16
    data = [d.view(rows, hidden) for d in inputs(c.size, rows * hidden, dtype)]
    generator = torch.Generator().manual_seed(1)
    residual = torch.randn(rows, hidden, generator=generator).to(dtype).cuda()
    weight = torch.randn(hidden, generator=generator).to(dtype).cuda()
    summed, x = ordered_sum(data).cuda(), data[c.rank].cuda()
    _, want_h = cuda_ops.add_rms_norm(summed, residual, weight, eps=1e-5)
    truth = F.rms_norm(want_h.double(), (hidden,), weight.double(), 1e-5)
    for algorithm in (peers.algorithms.one_shot, peers.algorithms.two_shot):
        h, y = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
        pointers = (x, residual, weight, h, y)
        args = (*(t.data_ptr() for t in pointers), rows, hidden, 1e-5, NCCL_TYPES[dtype])
        peers.group.all_reduce_norm(*args, algorithm, stream())
        assert torch.equal(h, want_h)
        assert ((y.double() - truth).abs() <= 2**-7 * truth.abs() + 1e-6).all()
    c.barrier()


@pytest.mark.parametrize("size", world_sizes())
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_all_reduce_norm(size, rows) -> None:
    run_on_gpus(fused, size, rows, 8192)


def replayed(c: NcclCommunicator) -> None:
    peers, code = Peers(c), NCCL_TYPES[torch.float32]
    x = torch.zeros(4096, device="cuda")

    def call() -> None:
        how = (peers.reductions.sum, peers.algorithms.two_shot)
        peers.group.all_reduce(x.data_ptr(), x.numel(), code, *how, stream())

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
        call()
    for step in range(10):
        x.fill_(1.0 + step)
        graph.replay()
        call()
        assert torch.equal(x.cpu(), torch.full((4096,), (1.0 + step) * c.size**3))
    c.barrier()


def test_graph_replay_keeps_the_epochs() -> None:
    run_on_gpus(replayed, 2)


def faulty(c: NcclCommunicator, kind: str) -> str:
    peers, x = Peers(c, timeout_s=1.0), torch.ones(64, device="cuda")
    count = 64 if kind == "missing" or c.rank == 0 else 32
    if not (kind == "missing" and c.rank == 1):
        how = (NCCL_TYPES[x.dtype], peers.reductions.sum, peers.algorithms.one_shot)
        peers.group.all_reduce(x.data_ptr(), count, *how, stream())
    torch.cuda.synchronize()
    text = ""
    try:
        peers.group.check()
    except PeerError as error:
        text = str(error)
    c.barrier()
    return text


def test_a_missing_peer_is_named() -> None:
    assert (
        "all_reduce #1 of group 'peers' (rank 0 of 2): rank 1 died, or did not come within"
        in (run_on_gpus(faulty, 2, "missing")[0])
    )


def test_different_calls_are_named() -> None:
    for text in run_on_gpus(faulty, 2, "mismatch"):
        assert "made another call" in text
