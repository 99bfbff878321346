"""Which ranks count as several hosts before Gloo connects: those that share no network."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from pyparallel.comm import interfaces

stat = os.stat


def told(monkeypatch: pytest.MonkeyPatch, *differ: str) -> list[str]:
    """What two ranks hear, threads of this process, whose namespaces of these kinds differ."""

    def of_thread(path: Any, **options: Any) -> Any:
        kind = str(path).removeprefix("/proc/self/ns/")
        return (
            SimpleNamespace(st_ino=threading.get_ident())
            if kind in differ
            else stat(path, **options)
        )

    def check(rank: int) -> str:
        try:
            interfaces.check_interfaces(store, rank, 2)
        except ValueError as error:
            return str(error)
        return ""

    store = dist.HashStore()
    monkeypatch.setattr(interfaces, "_unreachable", lambda: "127.0.1.1")
    monkeypatch.setattr(os, "stat", of_thread)
    with ThreadPoolExecutor(2) as ranks:
        return list(ranks.map(check, range(2)))


def test_containers_that_share_the_network_may_meet_on_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert told(monkeypatch, "pid", "user") == ["", ""]


def test_hosts_are_told_that_loopback_keeps_them_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = told(monkeypatch, "net")
    assert first == second
    assert (
        "rank 0: expected an address that the job's other hosts can reach, got 127.0.1.1" in first
    )
