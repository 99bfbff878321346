"""PeerError takes what RuntimeError takes, and names lost hosts before it."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from pyparallel.comm.communicator import PeerError
from pyparallel.comm.lost_hosts import forget_lost, tell_lost


@pytest.fixture
def lost() -> Iterator[None]:
    tell_lost("host b is lost", (1,))
    yield
    forget_lost()


@pytest.mark.parametrize("args", [(), ("told",), ("told", 2)])
def test_it_takes_what_runtime_error_takes(args: tuple[object, ...]) -> None:
    assert (PeerError(*args).args, str(PeerError(*args))) == (args, str(RuntimeError(*args)))


@pytest.mark.usefixtures("lost")
def test_lost_hosts_come_first_and_once() -> None:
    error = PeerError("told", 2)
    assert error.args == ("host b is lost; told", 2)
    assert pickle.loads(pickle.dumps(error)).args == error.args
    assert PeerError().args == ()
