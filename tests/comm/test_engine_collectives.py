"""The shared-memory engine against the sequential, rank-ordered sum: bit for bit, on every rank."""

from __future__ import annotations

import random
import time

import pytest
import torch
import torch.distributed as dist

from pyparallel.comm.shared.engine import SharedMemoryCommunicator
from pyparallel.comm.shared.host_tensors import DTYPES, REDUCIBLE
from pyparallel.launch import launch
from tests.comm.engine_checks import check_movement, check_reductions, made, reduced, same_bits

LENGTHS = (0, 1, 7, 63, 1000, 40_001)
HUGE = 3_000_001


def all_types(lengths: tuple[int, ...]) -> None:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "all")
    for length in lengths:
        for dtype in REDUCIBLE:
            check_reductions(comm, dtype, length)
        for dtype in DTYPES:
            check_movement(comm, dtype, length)
    comm.barrier()
    comm.close()


@pytest.mark.parametrize("size", range(1, 9))
def test_every_type_and_length(size: int) -> None:
    launch(all_types, size, LENGTHS)


@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyparallel._C import isa as detected

    order = ["plain", "avx2", "avx512", "avx512_bf16"]
    if order.index(isa) > order.index(detected()):
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("PYPARALLEL_ISA", isa)
    launch(all_types, 3, (5, 1000))


def huge(length: int) -> None:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "huge")
    check_reductions(comm, torch.float32, length)
    check_reductions(comm, torch.bfloat16, length)
    check_movement(comm, torch.float32, length)
    comm.close()


@pytest.mark.parametrize("size", [2, 3])
def test_many_slices_and_streaming_stores(size: int) -> None:
    launch(huge, size, HUGE)


def special_values() -> None:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "special")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        # Every bit pattern of the narrow types: subnormals, infinities, NaNs, ties to even.
        bits = torch.arange(-32768, 32768, dtype=torch.int16)
        values = bits.view(dtype) if dtype.itemsize == 2 else bits.view(torch.float16).float()
        other = values.roll(12345)
        data = (values if comm.rank == 0 else other).clone()
        comm.all_reduce(data)
        expected = reduced([values, other], "sum")
        both_nan = data.isnan() & expected.isnan()
        assert torch.equal(data.isnan(), expected.isnan())
        assert same_bits(data[~both_nan], expected[~both_nan]), dtype
        for op in ("max", "min"):
            data = (values if comm.rank == 0 else other).clone()
            comm.all_reduce(data, op=op)
            expected = reduced([values, other], op)
            assert torch.equal(data.isnan(), expected.isnan()), "a NaN must stay one"
            assert torch.equal(data[~data.isnan()], expected[~data.isnan()]), (dtype, op)
    comm.close()


def test_every_bit_pattern_of_the_narrow_types() -> None:
    launch(special_values, 2)


def order_of_ranks() -> float:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "order")
    # (1e8 + 1) - 1e8 is 0 in fp32, 1e8 - 1e8 + 1 is 1: only one order gives this rank's answer.
    data = torch.tensor([[1e8], [1.0], [-1e8]][comm.rank])
    comm.all_reduce(data)
    comm.close()
    return data.item()


def test_sums_run_in_rank_order() -> None:
    assert launch(order_of_ranks, 3) == [0.0, 0.0, 0.0]


def delayed(seed: int) -> None:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "delayed")
    shared = random.Random(seed)
    own = random.Random(seed + comm.rank)
    for epoch in range(40):
        length = shared.choice([1, 100, 5000, 300_000])
        if own.random() < 0.2:
            time.sleep(own.random() * 0.03)
        parts = [made(torch.float32, length, r, seed=epoch) for r in range(comm.size)]
        data = parts[comm.rank].clone()
        comm.all_reduce(data)
        # The result is read late, when peers are already calls ahead.
        if own.random() < 0.2:
            time.sleep(own.random() * 0.01)
        assert same_bits(data, reduced(parts, "sum"))
    comm.close()


@pytest.mark.parametrize("size", [2, 4])
def test_delayed_ranks(size: int) -> None:
    launch(delayed, size, 5)


def interleaved(seed: int) -> None:
    rank = dist.get_rank()
    world = SharedMemoryCommunicator.create(dist.group.WORLD, "world")
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    evens = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    again = SharedMemoryCommunicator.create(dist.group.WORLD, "again")
    pair = SharedMemoryCommunicator.create(pairs[rank // 2], f"pair{rank // 2}")
    even = SharedMemoryCommunicator.create(evens[rank % 2], f"parity{rank % 2}")
    shared = random.Random(seed)
    for step in range(200):
        comm = shared.choice([world, again, pair, even])
        check = shared.choice([check_reductions, check_movement])
        check(comm, shared.choice(REDUCIBLE), shared.choice([1, 17, 2000]) + step % 3)
    for comm in (world, again, pair, even):
        comm.close()


def test_random_interleavings_of_groups() -> None:
    launch(interleaved, 4, 11)


def asynchronous() -> None:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "async")
    tensors = [torch.full((1000 * (i + 1),), float(comm.rank + i)) for i in range(8)]
    works = [comm.all_reduce(tensor, async_op=True) for tensor in tensors]
    # A call that waits keeps its place behind those under way.
    last = torch.ones(3)
    comm.all_reduce(last)
    gathered = torch.empty(6)
    work = comm.all_gather(gathered, torch.full((3,), float(comm.rank)), async_op=True)
    for i, (tensor, handle) in enumerate(zip(tensors, works, strict=True)):
        handle.wait()
        assert torch.equal(tensor, torch.full_like(tensor, 1.0 + 2 * i))
    work.wait()
    assert last.tolist() == [2.0] * 3
    assert gathered.tolist() == [0.0] * 3 + [1.0] * 3
    comm.close()


def test_asynchronous_calls_keep_their_order() -> None:
    launch(asynchronous, 2)


def bad_arguments() -> list[str]:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "bad")
    x = torch.ones(6)
    calls = [
        lambda: comm.all_reduce(torch.ones(4, 4).t()),
        lambda: comm.all_reduce(x.to(torch.int8)),
        lambda: comm.all_reduce(x, op="prod"),
        lambda: comm.all_reduce(x.to("meta")),
        lambda: comm.all_gather(torch.ones(5), torch.ones(3)),
        lambda: comm.all_gather(torch.ones(6), torch.ones(3, dtype=torch.float64)),
        lambda: comm.all_gather(torch.ones(6), torch.ones(3), counts=[3, 4]),
        lambda: comm.all_gather(torch.ones(6), torch.ones(3), counts=[7, -1]),
        lambda: comm.reduce_scatter(torch.ones(2), x, counts=[3, 3]),
        lambda: comm.all_to_all(torch.ones(5), torch.ones(6)),
        lambda: comm.broadcast(x, 2),
        lambda: comm.send(x, comm.rank),
        lambda: comm.recv(x, 5),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        messages.append(str(caught.value))
    # Nothing was sent by a refused call: the group is as it was.
    comm.all_reduce(x)
    assert x.tolist() == [2.0] * 6
    comm.close()
    return messages


def test_bad_arguments_are_refused_and_harm_nothing() -> None:
    for message in launch(bad_arguments, 2)[0]:
        assert "\n" not in message
        assert "expected" in message, message


def all_send_first(length: int) -> None:
    comm = SharedMemoryCommunicator.create(dist.group.WORLD, "eager")
    for step in range(3):
        for tag in range(2):
            comm.send(made(torch.float32, length, comm.rank, tag), (comm.rank + 1) % 3, tag=tag)
        # What has no room yet goes on its way during other calls.
        data = torch.ones(1000)
        comm.all_reduce(data)
        assert data[0] == 3
        for tag in range(2):
            inbox = torch.empty(length)
            comm.recv(inbox, (comm.rank - 1) % 3, tag=tag)
            assert same_bits(inbox, made(torch.float32, length, (comm.rank - 1) % 3, tag)), step
    # The last message is delivered by close().
    if comm.rank == 0:
        comm.send(torch.ones(length), 1)
    if comm.rank == 1:
        time.sleep(0.2)
        inbox = torch.empty(length)
        comm.recv(inbox, 0)
        assert inbox.sum() == length
    comm.close()


def test_everyone_may_send_first() -> None:
    launch(all_send_first, 3, 500_000)
