"""The communicator's contract: flat buffers, uneven counts, rank order, errors that name the peer."""

from __future__ import annotations

import os
import time
from functools import reduce

import pytest
import torch

from pyparallel.comm.communicator import PeerError
from pyparallel.comm.group import Group
from pyparallel.comm.local_engine import LocalCommunicator
from pyparallel.comm.rank_order import rank_ordered_reduce
from pyparallel.comm.torch_engine import ONE_SHOT_BYTES, TorchCommunicator
from pyparallel.launch import launch
from pyparallel.mesh import init_mesh
from pyparallel.testing import assert_equal, normals, run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)


def engine(group: Group):
    """The engine over torch.distributed, whichever one the mesh has chosen."""
    if group.size == 1:
        return LocalCommunicator()
    return TorchCommunicator(torch.distributed.group.WORLD, "test")


def value(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return (normals(count, seed=rank) * 8).to(dtype)


def in_rank_order(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """Written out again: sums in fp32 (fp64 and integers in their own), rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    fold = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[op]
    return reduce(fold, [part.to(wide) for part in parts]).to(dtype)


def reductions(group: Group) -> None:
    comm, ranks = engine(group), group.size
    large = ONE_SHOT_BYTES // 4 + 3
    for dtype in DTYPES:
        for count in (0, 1, ranks - 1, 7, 1000, large):
            for op in ("sum", "max", "min") if count == 7 else ("sum",):
                what = f"{dtype} {count} {op}"
                parts = [value(rank, count, dtype) for rank in range(ranks)]
                truth = in_rank_order(parts, op)
                tensor = parts[group.rank].clone()
                assert comm.all_reduce(tensor, op=op) is None
                assert_equal(tensor, truth, "all_reduce " + what)
                tensor = parts[group.rank].clone()
                comm.all_reduce(tensor, op=op, async_op=True).wait()
                assert_equal(tensor, truth, "all_reduce async " + what)

                counts = [count // ranks] * ranks
                counts[-1] += count % ranks
                for sizes in (counts, counts[::-1], [count, *[0] * (ranks - 1)]):
                    own = tensor.new_empty(sizes[group.rank])
                    comm.reduce_scatter(own, parts[group.rank], counts=sizes, op=op)
                    assert_equal(own, truth.split(sizes)[group.rank], "reduce_scatter " + what)


def movements(group: Group) -> None:
    comm, ranks, rank = engine(group), group.size, group.rank
    for dtype in (*DTYPES, torch.bool, torch.uint8):
        for sizes in ([3] * ranks, [2 * r for r in range(ranks)], [0] * ranks):
            parts = [value(r, size, torch.float32).to(dtype) for r, size in enumerate(sizes)]
            output = torch.empty(sum(sizes), dtype=dtype)
            comm.all_gather(output, parts[rank], counts=sizes)
            assert_equal(output, torch.cat(parts), f"all_gather {dtype} {sizes}")
            # Rank s sends s + r elements of its own number to rank r.
            sent = [rank + r for r in range(ranks)]
            outbox = torch.full((sum(sent),), float(rank)).to(dtype)
            received = [s + rank for s in range(ranks)]
            inbox = torch.empty(sum(received), dtype=dtype)
            comm.all_to_all(inbox, outbox, output_counts=received, input_counts=sent)
            truth = [torch.full((n,), float(s)).to(dtype) for s, n in enumerate(received)]
            assert_equal(inbox, torch.cat(truth), f"all_to_all {dtype}")
        for source in range(ranks):
            tensor = value(rank, 5, torch.float32).to(dtype)
            comm.broadcast(tensor, source)
            assert_equal(tensor, value(source, 5, torch.float32).to(dtype), f"broadcast {dtype}")
    comm.barrier()


def points(group: Group) -> None:
    """Both sides send first, several messages with tags in another order; none waits for ever."""
    comm, ranks, rank = engine(group), group.size, group.rank
    after, before = (rank + 1) % ranks, (rank - 1) % ranks
    for tag in (1, 2):
        comm.send(torch.full((1 << 18,), float(10 * rank + tag)), after, tag=tag)
    for tag in (2, 1):
        tensor = torch.empty(1 << 18)
        comm.recv(tensor, before, tag=tag)
        assert bool((tensor == 10 * before + tag).all())
    comm.close()
    with pytest.raises(PeerError, match="all_reduce: the group 'test' is closed"):
        comm.all_reduce(torch.ones(1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_reductions_run_in_rank_order(ranks):
    run_ranks(reductions, ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_data_arrives_where_it_belongs(ranks):
    run_ranks(movements, ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_sends_do_not_wait_for_each_other(ranks):
    run_ranks(points, ranks)


def test_another_order_or_a_narrow_sum_would_be_seen():
    """The reference itself: bf16 sums in fp32, and in this order only."""
    parts = [torch.tensor([x]).bfloat16() for x in (256.0, 1.0, 1.0)]
    output = torch.empty(1, dtype=torch.bfloat16)
    rank_ordered_reduce(parts, "sum", output)
    assert output.item() == 258.0
    assert (parts[0] + parts[1] + parts[2]).item() == 256.0
    parts = [torch.tensor([x]) for x in (2.0**24, 1.0, 1.0)]
    output = torch.empty(1)
    rank_ordered_reduce(parts, "sum", output)
    assert output.item() == 2.0**24
    rank_ordered_reduce(parts[::-1], "sum", output)
    assert output.item() == 2.0**24 + 2


def wrong_buffers(group: Group) -> None:
    comm = engine(group)
    with pytest.raises(
        ValueError, match="output: expected 2 x input's 3 elements, got 7; give counts="
    ):
        comm.all_gather(torch.empty(7), torch.ones(3))
    with pytest.raises(
        ValueError, match=r"counts: expected 2 numbers .* sum to input's 7 .*, got \[3, 3\]"
    ):
        comm.reduce_scatter(torch.empty(3), torch.ones(7), counts=[3, 3])
    with pytest.raises(
        ValueError, match=r"all_gather: input: expected this rank's .* = 3 .*, got 2"
    ):
        comm.all_gather(torch.empty(6), torch.ones(2), counts=[3, 3])
    with pytest.raises(ValueError, match=r"reduce_scatter: output: expected .* got 2"):
        comm.reduce_scatter(torch.empty(2), torch.ones(6), counts=[3, 3])


def test_buffers_that_do_not_fit_are_named():
    run_ranks(wrong_buffers, 2)
    for call in (LocalCommunicator("cp").send, LocalCommunicator("cp").recv):
        with pytest.raises(ValueError, match="the group 'cp' has one rank"):
            call(torch.ones(1), 1)


def lose_a_peer(group_size: int) -> str:
    comm = engine(init_mesh(tp=group_size).tp)
    comm.barrier()
    if comm.rank == 1:
        time.sleep(0.2)
        os._exit(3)
    start = time.monotonic()
    with pytest.raises(PeerError, match=rf"all_reduce on group 'test' \(rank {comm.rank} of 3\)"):
        comm.all_reduce(torch.ones(4))
    assert time.monotonic() - start < 20
    raise AssertionError("a rank that lost its peer saw it in time")


def test_a_lost_peer_is_an_error_that_names_the_call():
    from pyparallel.launch import RankError

    with pytest.raises(RankError, match="rank 1 of 3: ended with exit status 3"):
        launch(lose_a_peer, 3, 3)
