"""Deaths of neighbours and roll calls, with real processes and a real store; no GPU in it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from pyparallel.comm.peer_watch import ROLL_CALL_S, PeerWatch, meet_neighbours, roll_call


def sleeper() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


class Calls:
    """What a watch reported, and when."""

    def __init__(self) -> None:
        self.ranks: list[list[int]] = []
        self.came = threading.Event()

    def __call__(self, ranks: list[int]) -> None:
        self.ranks.append(ranks)
        self.came.set()


def test_a_killed_neighbour_is_noticed_in_under_a_second() -> None:
    children = [sleeper(), sleeper()]
    calls = Calls()
    watch = PeerWatch({3: children[0].pid, 5: children[1].pid}, calls)
    try:
        assert not calls.came.wait(0.3)
        started = time.monotonic()
        children[1].kill()
        assert calls.came.wait(1.0)
        assert time.monotonic() - started < 1.0
        assert calls.ranks == [[5]]
    finally:
        watch.close()
        for child in children:
            child.kill()
            child.wait()


def test_a_neighbour_that_is_gone_already() -> None:
    child = sleeper()
    child.kill()
    child.wait()
    calls = Calls()
    watch = PeerWatch({1: child.pid}, calls)
    assert calls.came.wait(1.0) and calls.ranks == [[1]]
    watch.close()


def test_ticks_end_the_watch() -> None:
    ticks = []
    watch = PeerWatch({}, Calls(), tick=lambda: len(ticks) < 2 and not ticks.append(1))
    watch.thread.join(2.0)
    assert not watch.thread.is_alive() and len(ticks) == 2
    watch.close()


def test_a_closed_watch_says_nothing() -> None:
    child, calls = sleeper(), Calls()
    watch = PeerWatch({0: child.pid}, calls)
    watch.close()
    child.kill()
    child.wait()
    assert not calls.came.wait(0.3)


def test_roll_call_names_the_silent() -> None:
    store = dist.HashStore()
    answers: dict[int, tuple[int, ...]] = {}
    threads = [
        threading.Thread(target=lambda r=r: answers.update({r: roll_call(store, r, 4)}))
        for r in (0, 2)
    ]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {0: (1, 3), 2: (1, 3)}
    assert time.monotonic() - started < ROLL_CALL_S + 1


@pytest.mark.parametrize("size", [1, 3])
def test_neighbours_meet(size: int) -> None:
    import os

    store = dist.HashStore()
    found: dict[int, dict[int, int]] = {}
    threads = [
        threading.Thread(target=lambda r=r: found.update({r: meet_neighbours(store, r, size)}))
        for r in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(size):
        assert found[rank] == {r: os.getpid() for r in range(size) if r != rank}
