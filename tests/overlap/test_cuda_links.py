"""Peer memory and registered windows without a GPU: the extension's part is played by host memory."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench.overlap.simulate import run_rank, run_ranks
from pyparallel.comm.cuda import peers as cuda_peers
from pyparallel.comm.cuda.peers import GRANULE, PeerMemory
from pyparallel.comm.cuda.windows import Windows
from pyparallel.native.cuda import extension as cuda_extension
from pyparallel.overlap.cuda_links import NcclLink, PeerLink
from pyparallel.overlap.links import Mailbox
from pyparallel.overlap.pipelines import (
    Plan,
    all_gather_linear_backward_pipeline,
    all_gather_linear_pipeline,
    linear_reduce_scatter_backward_pipeline,
    linear_reduce_scatter_pipeline,
)
from tests.overlap.test_simulate import K, N, row_by_row, row_by_row_plain


class HostSegments:
    """`IpcSegments`: an address for a handle, by a table."""

    table: ClassVar[dict[bytes, HostSegments]] = {}
    opened = closed = 0

    def __init__(self, num_bytes: int) -> None:
        self.memory = (ctypes.c_uint8 * num_bytes)()
        self.key = str(id(self)).encode()
        HostSegments.table[self.key] = self

    def handle(self) -> bytes:
        return self.key

    def open(self, rank: int, handles: list[bytes]) -> list[int]:
        HostSegments.opened += len(handles) - 1
        return [ctypes.addressof(HostSegments.table[handle].memory) for handle in handles]

    def close(self) -> None:
        HostSegments.closed += 1


class HostGroup:
    """`PeerGroup`: copies on the host, and a barrier of threads."""

    met: threading.Barrier

    def __init__(self, name: str, rank: int, slot: int, timeout: float, bases: list[int]) -> None:
        assert len(bases) == HostGroup.met.parties and 0 <= rank < len(bases)

    @staticmethod
    def segment_bytes(size: int, slot_bytes: int) -> int:
        return 1024

    def copy(self, to: int, source: int, num_bytes: int, stream: int) -> None:
        ctypes.memmove(to, source, num_bytes)

    def barrier(self, stream: int) -> None:
        HostGroup.met.wait(20.0)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension, tensors over its memory, and streams, all on the host."""
    extension = SimpleNamespace(
        IpcSegments=HostSegments,
        PeerGroup=HostGroup,
        Algorithm=SimpleNamespace(one_shot="one_shot", two_shot="two_shot"),
        Reduction=SimpleNamespace(sum=1, max=2, min=3),
    )
    HostSegments.table, HostSegments.opened, HostSegments.closed = {}, 0, 0

    def tensor_at(address: int, num_bytes: int) -> Tensor:
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8)

    monkeypatch.setattr(cuda_extension, "load", lambda: extension)
    monkeypatch.setattr(cuda_extension, "tensor_at", tensor_at)
    monkeypatch.setattr(cuda_extension, "stream", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


class Refusing:
    """An engine that registers nothing."""

    def __init__(self) -> None:
        self.asked = 0

    def allocate_window(self, num_bytes: int) -> tuple[int, int]:
        self.asked += 1
        return 0, 0


def peers_of(rank: int, size: int, store: dist.Store) -> SimpleNamespace:
    """What a PeerLink wants of a communicator."""
    return SimpleNamespace(
        rank=rank,
        size=size,
        peers=PeerMemory(store, rank, size, "g", timeout_s=5.0),
        windows=Windows(Refusing()),
        call=lambda call, *args: call(*args),
    )


def on_ranks(size: int, run: Callable[[int], object]) -> list:
    """run(rank) on a thread each; re-raises the first error."""
    HostGroup.met = threading.Barrier(size)
    results: list = [None] * size
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            results[rank] = run(rank)
        except BaseException as error:
            errors.append(error)
            HostGroup.met.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


BOTH = [(3, 0, 5), (40, 60, 50)]


def test_the_pipelines_over_peer_memory(host, monkeypatch: pytest.MonkeyPatch) -> None:
    """All four, twice, with more rows the second time: the bits of the plain path over messages."""
    monkeypatch.setattr(cuda_peers, "GRANULE", 64)
    size, store = 3, dist.HashStore()

    def pipelines(rank: int, plan: Plan, link: object, seed: int) -> list:
        rows, generator = plan.rows, torch.Generator().manual_seed(seed * size + rank)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).bfloat16()

        own, total, weight = rows[rank], sum(rows), randn(N, K)
        x, full, dy, dy_full = randn(own, K), randn(total, K), randn(own, N), randn(total, N)
        how = {"plan": plan, "link": link}
        forward, back = {**how, "linear": row_by_row}, {**how, "linear": row_by_row_plain}
        return [
            lambda: all_gather_linear_pipeline(x, weight, **forward),
            lambda: linear_reduce_scatter_pipeline(full, weight, **forward),
            lambda: all_gather_linear_backward_pipeline(dy_full, x, weight, **back),
            lambda: linear_reduce_scatter_backward_pipeline(dy, full, weight, **back),
        ]

    def rank(r: int) -> list[Tensor]:
        link, results = PeerLink(peers_of(r, size, store)), []
        for seed, rows in enumerate(BOTH):
            for build in pipelines(r, Plan(r, rows, 1 + seed, "copy"), link, seed):
                pipeline = build()
                run_rank(pipeline, seed=seed, max_delay=2e-4)
                results += pipeline.results
        assert len(link.communicator.peers.segments) == 6, "the group's, 2 published, 3 partial"
        link.communicator.peers.close()
        return results

    got = on_ranks(size, rank)
    assert HostSegments.opened == 6 * size * (size - 1) and HostSegments.closed == 6 * size
    for seed, rows in enumerate(BOTH):
        for index in range(4):
            box = Mailbox(size)
            plain = [
                pipelines(r, Plan(r, rows, 0), box.link(r), seed)[index]() for r in range(size)
            ]
            run_ranks(plain, box, seed=0, max_delay=0.0)
            for r, pipeline in enumerate(plain):
                for want in pipeline.results:
                    assert torch.equal(got[r].pop(0), want), (seed, index, r)


def test_memory_grows_by_doubling_and_keeps_its_place(host) -> None:
    store = dist.HashStore()

    def rank(r: int) -> list[int]:
        peers = peers_of(r, 2, store).peers
        like = torch.empty(0, dtype=torch.bfloat16)
        sizes = []
        for rows in (1, GRANULE // 32, GRANULE // 32 + 1, 3 * GRANULE // 32):
            matrix = peers.share("partial", rows, 16, like)
            assert matrix.own.shape == (rows, 16)
            sizes.append(peers.buffers["partial"][0] // GRANULE)
        again = peers.share("partial", 2, 16, like).own
        assert again.data_ptr() == peers.buffers["partial"][1][r]
        return sizes

    assert on_ranks(2, rank) == [[1, 1, 2, 4]] * 2


def test_a_capture_makes_no_new_memory(host, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    peers = on_ranks(1, lambda r: peers_of(r, 1, store))[0].peers
    like = torch.empty(0)
    peers.share("published", 8, 4, like)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    peers.share("published", 8, 4, like)
    with pytest.raises(ValueError, match=r"published: expected at most .* run the layer once"):
        peers.share("published", GRANULE, 4, like)


class Registering:
    """An engine whose windows lie on the host, every call written down."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.memories: list = []

    def allocate_window(self, num_bytes: int) -> tuple[int, int]:
        self.memories.append((ctypes.c_uint8 * num_bytes)())
        self.calls.append(("allocate", num_bytes))
        return len(self.memories), ctypes.addressof(self.memories[-1])

    def free_window(self, window: int) -> None:
        self.calls.append(("free", window))


def test_pipelines_take_registered_memory_once(host) -> None:
    engine = Registering()
    link = NcclLink(SimpleNamespace(windows=Windows(engine), size=2))
    x, weight = torch.zeros(4, K), torch.zeros(N, K)
    plan = Plan(0, (4, 3), 1)
    for _ in range(3):
        gather = all_gather_linear_pipeline(x, weight, plan=plan, link=link)
        scatter = linear_reduce_scatter_pipeline(torch.zeros(7, K), weight, plan=plan, link=link)
    assert engine.calls == [("allocate", GRANULE)] * 3
    addresses = {ctypes.addressof(memory) for memory in engine.memories}
    assert gather.views["landing"](0, 0).data_ptr() in addresses
    assert scatter.views["partial"](0, 0).data_ptr() in addresses
    assert scatter.views["landed"](0, 0).data_ptr() in addresses
    link.communicator.windows.close()
    assert engine.calls[3:] == [("free", 3), ("free", 2), ("free", 1)]


def test_windows_grow_and_a_capture_goes_without(host, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Registering()
    windows = Windows(engine)
    small = windows.memory("landed", 100)
    assert windows.memory("landed", GRANULE).data_ptr() == small.data_ptr()
    assert windows.memory("landed", GRANULE + 1).numel() == 2 * GRANULE
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert windows.memory("landed", 3 * GRANULE) is None and windows.memory("new", 1) is None
    assert windows.memory("landed", 2 * GRANULE).numel() == 2 * GRANULE
    assert len(engine.calls) == 2


def test_refused_windows_are_asked_for_once(host) -> None:
    engine = Refusing()
    windows = Windows(engine)
    assert windows.memory("a", 1) is None and windows.memory("b", 1) is None
    assert engine.asked == 1
    link = NcclLink(SimpleNamespace(windows=windows, size=2))
    like = torch.zeros(1, dtype=torch.bfloat16)
    assert link.buffer("a", (2, 3), like, elements=6).shape == (2, 3)
