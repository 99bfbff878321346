"""launch(): results, failures of every kind, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import sys
import threading
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from pyparallel.comm.collectives import all_reduce_raw
from pyparallel.comm.communicator import PeerError
from pyparallel.comm.torch_engine import TorchCommunicator
from pyparallel.launch import RankError, _collect, _failure, _message, launch
from pyparallel.mesh import init_mesh

# A rank's own errors arrive within this; nothing here waits for a collective's timeout.
SOON_S = 30.0


def rank_and_world(*args):
    return dist.get_rank(), dist.get_world_size(), *args


def shared_memory() -> set[str]:
    # Not multiprocessing's own semaphores: launch makes none, other tests may.
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def ranks_alive() -> list[psutil.Process]:
    """Ranks are children of the server, which is this process's child."""
    servers = psutil.Process().children()
    return [rank for server in servers for rank in server.children()]


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No rank of this process lives on, and no shared memory has a name."""
    before = shared_memory()
    yield
    deadline = time.monotonic() + 3
    while (ranks_alive() or shared_memory() - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not ranks_alive()
    assert not shared_memory() - before


def test_ranks_are_seen_while_they_live():
    seen = launch(rank_and_world, 1)
    assert seen == [(0, 1)]
    context = multiprocessing.get_context("forkserver")
    sleeper = context.Process(target=time.sleep, args=(60,))
    sleeper.start()
    try:
        assert [rank.pid for rank in ranks_alive()] == [sleeper.pid]
    finally:
        sleeper.kill()
        sleeper.join()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_results_are_in_the_order_of_ranks(ranks):
    assert launch(rank_and_world, ranks, "a", 2) == [(r, ranks, "a", 2) for r in range(ranks)]


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("the cause")
    group = init_mesh(tp=dist.get_world_size()).tp
    all_reduce_raw(torch.ones(4), group)


def raise_in_the_midst(rank: int) -> None:
    group = init_mesh(tp=dist.get_world_size()).tp
    if dist.get_rank() == rank:
        # The peers wait in a collective, lose this rank and report that first.
        time.sleep(0.2)
        raise KeyError("the cause")
    all_reduce_raw(torch.ones(4), group)


@pytest.mark.parametrize("fn", [raise_on, raise_in_the_midst])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_cause_is_raised_before_its_consequences(fn, rank):
    start = time.monotonic()
    with pytest.raises(RankError, match=rf"rank {rank} of 3: KeyError: 'the cause'") as caught:
        launch(fn, 3, rank)
    assert time.monotonic() - start < SOON_S
    assert caught.value.rank == rank and caught.value.world_size == 3
    assert isinstance(caught.value.__cause__, KeyError)
    assert fn.__name__ in caught.value.remote_traceback


def fail_after_a_send() -> None:
    communicator = TorchCommunicator(dist.group.WORLD, "test")
    if communicator.rank == 0:
        communicator.send(torch.ones(1 << 20), 1)
        raise KeyError("the cause")
    time.sleep(60)


def test_a_failed_rank_does_not_wait_for_what_it_sent():
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 of 2: KeyError"):
        launch(fail_after_a_send, 2)
    assert time.monotonic() - start < SOON_S


def die(rank: int, how: str) -> None:
    group = init_mesh(tp=dist.get_world_size()).tp
    if dist.get_rank() == rank:
        if how == "exit":
            os._exit(0)
        if how == "sys.exit":
            sys.exit(7)
        os.kill(os.getpid(), signal.SIGKILL)
    all_reduce_raw(torch.ones(4), group)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("exit", "ended with exit status 0 before it returned"),
        ("sys.exit", "SystemExit: 7"),
        ("kill", "killed by SIGKILL"),
    ],
)
def test_a_death_is_told_as_such(how, told):
    start = time.monotonic()
    with pytest.raises(RankError, match=f"rank 1 of 3: {told}"):
        launch(die, 3, 1, how)
    assert time.monotonic() - start < SOON_S


class Killed:
    exitcode = -signal.SIGKILL

    def join(self, timeout: float) -> None:
        pass


def test_a_rank_killed_in_the_middle_of_its_message_is_told():
    receiver, sender = multiprocessing.Pipe(duplex=False)
    os.write(sender.fileno(), struct.pack("!i", 1000) + bytes(10))
    sender.close()
    assert _message(Killed(), receiver).reason == "killed by SIGKILL"


def lines_of(*errors: Exception) -> tuple[list, list]:
    """Ranks that are nothing but pipes, and the ends through which they tell of their errors."""
    pipes = [multiprocessing.Pipe(duplex=False) for _ in errors]
    return [(Killed(), receiver) for receiver, _ in pipes], [sender for _, sender in pipes]


def test_a_lost_peer_that_is_heard_first_is_not_the_cause():
    errors = [PeerError("rank 1 is gone"), KeyError("the cause"), PeerError("rank 1 is gone")]
    ranks, senders = lines_of(*errors)
    for place in (0, 2):
        senders[place].send_bytes(_failure(errors[place]))
    threading.Timer(0.1, senders[1].send_bytes, [_failure(errors[1])]).start()
    with pytest.raises(RankError, match="rank 1 of 3: KeyError: 'the cause'"):
        _collect(ranks, None)


def test_a_death_that_is_heard_last_is_the_cause():
    errors = [PeerError("rank 1 is gone"), OSError("never told")]
    ranks, senders = lines_of(*errors)
    senders[0].send_bytes(_failure(errors[0]))
    threading.Timer(0.1, senders[1].close).start()
    with pytest.raises(RankError, match="rank 1 of 2: killed by SIGKILL"):
        _collect(ranks, None)


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")
        self.lock = __import__("threading").Lock()


def raise_unpicklable() -> None:
    raise Unpicklable("this", "that")


def return_unpicklable():
    return lambda: None


def return_what_only_a_rank_can_read():
    return OnlyInARank()


class OnlyInARank:
    def __reduce__(self):
        return _restore, (os.getpid(),)


def _restore(pid: int):
    if os.getpid() != pid:
        raise LookupError("not this process")


@pytest.mark.parametrize(
    ("fn", "told"),
    [
        (raise_unpicklable, "Unpicklable: this and that"),
        (return_unpicklable, "TypeError: the result of fn must be picklable, got function"),
        (return_what_only_a_rank_can_read, "its result can't be unpickled here: LookupError"),
    ],
)
def test_what_does_not_pickle_is_told(fn, told):
    with pytest.raises(RankError, match=f"rank [01] of 2: {told}"):
        launch(fn, 2)


def test_bad_calls_are_refused_before_a_rank_starts():
    with pytest.raises(ValueError, match="world_size: expected at least 1, got 0"):
        launch(rank_and_world, 0)
    with pytest.raises(ValueError, match="fn and its arguments must be picklable"):
        launch(lambda: None, 2)
    with pytest.raises(ValueError, match="fn and its arguments must be picklable"):
        launch(rank_and_world, 2, lambda: None)


def start_more() -> str:
    try:
        launch(rank_and_world, 1)
    except ValueError as error:
        return str(error)
    return "started"


def test_a_rank_starts_no_ranks():
    assert launch(start_more, 1) == ["launch: called by a rank; ranks start no ranks of their own"]


def add_rank(tensor: torch.Tensor) -> torch.Tensor:
    tensor += dist.get_rank() + 1
    return tensor


def test_tensors_go_by_value():
    tensor = torch.zeros(3)
    results = launch(add_rank, 3, tensor)
    assert not tensor.any() and not tensor.is_shared()
    assert [result.tolist() for result in results] == [[1.0] * 3, [2.0] * 3, [3.0] * 3]


def big(megabytes: int) -> torch.Tensor:
    return torch.full((megabytes << 18,), float(dist.get_rank()))


def test_large_results_arrive():
    for rank, result in enumerate(launch(big, 2, 16)):
        assert result.numel() == 16 << 18 and bool((result == rank).all())


def environment() -> tuple:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PYPARALLEL_TEST_MARK")
    return *(os.environ.get(name) for name in names), torch.get_num_threads()


def test_the_environment_is_the_callers_and_the_rank_its_own(monkeypatch):
    # As inside a torchrun job, whose variables must not reach the ranks.
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("PYPARALLEL_TEST_MARK", "now")
    expected = [(str(r), str(r), "2", "2", "now", 1) for r in range(2)]
    assert launch(environment, 2, threads=1) == expected
    monkeypatch.delenv("PYPARALLEL_TEST_MARK")
    assert launch(environment, 1, threads=2) == [("0", "0", "1", "1", None, 2)]
