import ctypes
import time

import pytest
import torch
import triton.language as tl
from helpers import DTYPES, normal
from ranks import run_ranks

from pyparallel.cut.shard import part_sizes
from pyparallel.kernels.collective import symmetric
from pyparallel.kernels.collective.collectives import (
    all_gather,
    all_reduce,
    all_reduce_out,
    even_counts,
    reduce_scatter,
)
from pyparallel.kernels.collective.symmetric import FLAG_BYTES, SymmetricMemory

EPOCHS = 6


def data(rank, epoch, n, dtype):
    # Each rank can rebuild every other's input: the truth needs no communication.
    return normal(n, dtype=dtype, seed=1000 * epoch + rank, scale=10.0 ** (rank - 1))


def ordered_sum(parts):
    """In rank order, in fp32, rounded once: what every rank must hold, to the bit."""
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total = total + part.float()
    return total.to(parts[0].dtype)


@pytest.fixture(params=[True, False], ids=["poll", "counted polls"])
def polling(request, monkeypatch):
    """Both ways to wait: with Triton's clock, where it has one, and by counting."""
    if request.param and not symmetric.HAS_POLL:
        pytest.skip("this Triton has no atomic_poll")
    monkeypatch.setattr(symmetric, "_HAS_POLL", tl.constexpr(request.param))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_all_reduce_over_epochs(size, algorithm, polling):
    def body(memory):
        for epoch in range(EPOCHS):
            dtype = DTYPES[epoch % 3]
            n = [5000, 17, 1, 6200, 0, 4097][epoch]
            parts = [data(r, epoch, n, dtype) for r in range(size)]
            if epoch % size == memory.rank:
                time.sleep(0.02)
            got = all_reduce(parts[memory.rank], memory, algorithm=algorithm)
            assert torch.equal(got, ordered_sum(parts)), f"epoch {epoch}"
        return int(memory.state[0])

    assert run_ranks(size, body) == [1 + EPOCHS] * size


def test_the_order_of_the_sum_matters_to_the_bit():
    """The equality above would fail for another order: fp32 addition does not associate."""
    parts = [data(r, 0, 5000, torch.float32) for r in range(3)]
    assert not torch.equal(ordered_sum(parts), ordered_sum(parts[::-1]))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gather_and_scatter_over_epochs(size):
    layouts = [None, [2100, 16, 1, 33], [64, 0, 4096, 7], [0, 0, 5, 0]]

    def body(memory):
        rank = memory.rank
        for epoch in range(EPOCHS):
            dtype = DTYPES[epoch % 3]
            counts = layouts[epoch % len(layouts)]
            counts = None if counts is None else counts[:size]
            sizes = [48] * size if counts is None else counts
            parts = [data(r, epoch, sizes[r], dtype) for r in range(size)]
            if (epoch + 1) % size == rank:
                time.sleep(0.02)
            assert torch.equal(all_gather(parts[rank], memory, counts=counts), torch.cat(parts))
            whole = [data(r, epoch + 50, sum(sizes), dtype) for r in range(size)]
            got = reduce_scatter(whole[rank], memory, counts=counts)
            assert torch.equal(got, ordered_sum(whole).split(sizes)[rank]), f"epoch {epoch}"

    run_ranks(size, body)


def test_epochs_wrap():
    def body(memory):
        for epoch in range(EPOCHS):
            parts = [data(r, epoch, 100, torch.float32) for r in range(2)]
            assert torch.equal(all_reduce(parts[memory.rank], memory), ordered_sum(parts))
        return int(memory.state[0])

    assert run_ranks(2, body, first_epoch=2**31 - 3) == [-(2**31) + 3] * 2


def test_a_call_leaves_what_the_one_before_published():
    """A peer may still read that: calls take the two halves of the region in turn."""

    def body(memory):
        own = int(memory.addresses[memory.rank]) + FLAG_BYTES
        for epoch in range(1, EPOCHS):
            xs = [torch.full((8,), float(10 * e + memory.rank)) for e in (epoch - 1, epoch)]
            all_reduce(xs[1], memory, algorithm="one_shot")
            halves = [
                (ctypes.c_float * 8).from_address(own + half * memory.capacity)[:]
                for half in ((epoch - 1) % 2, epoch % 2)
            ]
            if epoch > 1:
                assert halves == [x.tolist() for x in xs], epoch

    run_ranks(2, body)


def test_mixed_operations_share_the_flags():
    def body(memory):
        for epoch in range(EPOCHS):
            parts = [data(r, epoch, 96, torch.float32) for r in range(3)]
            mine = parts[memory.rank]
            total = ordered_sum(parts)
            scattered = reduce_scatter(mine, memory)
            assert torch.equal(all_gather(scattered, memory), total)
            all_reduce_out(mine, mine, memory, algorithm="two_shot")
            assert torch.equal(mine, total)

    run_ranks(3, body)


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_a_rank_that_never_comes_is_named_in_time(algorithm, polling):
    def body(memory):
        x = torch.ones(300)
        all_reduce(x, memory, algorithm=algorithm)
        memory.timeout_ns = 1_000_000_000
        if memory.rank == 1:
            return None
        started = time.monotonic()
        try:
            all_reduce(x, memory, algorithm=algorithm)
        except TimeoutError as error:
            return time.monotonic() - started, str(error)
        raise AssertionError("nobody noticed")

    results = run_ranks(3, body)
    for rank in (0, 2):
        waited, message = results[rank]
        assert waited < 20
        assert message.startswith(f"all_reduce: rank {rank} of 3 waited 1 s in call 2 for rank")
    assert "for rank 1," in results[0][1]


def test_bad_input():
    memory = SymmetricMemory(0, [1 << 20, 2 << 20], 1 << 20)
    with pytest.raises(ValueError, match="no equal division; pass counts"):
        reduce_scatter(torch.zeros(5), memory)
    with pytest.raises(ValueError, match=r"2 sizes that sum to 5, got \[1, 2\]"):
        reduce_scatter(torch.zeros(5), memory, counts=[1, 2])
    with pytest.raises(ValueError, match="bytes of symmetric memory"):
        all_reduce(torch.zeros(1 << 20), memory)
    with pytest.raises(ValueError, match="algorithm: expected one_shot or two_shot"):
        all_reduce(torch.zeros(4), memory, algorithm="ring")
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        SymmetricMemory(2, [16, 32], 1 << 20)
    for n in (0, 1, 15, 16, 100, 4097):
        assert even_counts(n, 3) == part_sizes(n, 3, unit=16)
        assert sum(even_counts(n, 3)) == n
