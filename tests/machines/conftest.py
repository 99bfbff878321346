"""Hosts for the tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.machines.hosts import Hosts, some_hosts

NEEDS_ROOT = "only root may make network namespaces"


@pytest.fixture
def open_hosts() -> Iterator[Callable[[int], Hosts]]:
    """Opens so many hosts; they are gone after the test, which is skipped where there can be none."""
    with ExitStack() as opened:

        def open_some(count: int) -> Hosts:
            if os.geteuid() != 0:
                pytest.skip(NEEDS_ROOT)
            try:
                return opened.enter_context(some_hosts(count))
            except PermissionError:
                pytest.skip(NEEDS_ROOT)

        yield open_some


@pytest.fixture
def hosts(open_hosts: Callable[[int], Hosts]) -> Hosts:
    """Two of them."""
    return open_hosts(2)
