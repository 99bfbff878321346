"""The launcher's table: what ranks ask of it, and how often."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import pytest
import torch.distributed as dist

from pyparallel.launch import launch
from pyparallel.ranks.store import InheritedStore, StoreServer

VALUES = {"empty": b"", "zero": b"\0\0", "long": bytes(range(256)) * 300}


def test_several_values_at_once() -> None:
    server = StoreServer()
    store = InheritedStore(server.channel().detach(), timedelta(seconds=0.2))
    store.multi_set(list(VALUES), list(VALUES.values()))
    assert store.multi_get(list(VALUES)) == list(VALUES.values())
    # As torch's own groups ask, through a prefix.
    prefixed = dist.PrefixStore("group", store)
    prefixed.multi_set(["a", "b"], [b"1", b"2"])
    assert prefixed.multi_get(["b", "a"]) == [b"2", b"1"]
    with pytest.raises(dist.DistStoreError, match=r"wait timeout after 0\.2 s"):
        store.multi_get(["long", "nowhere"])
    server.close()


def test_ranks_do_not_ask_for_each_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asked twice for every other one's address: most of a launch of many."""
    asked: Counter[str] = Counter()
    real = StoreServer._do

    def counted(self: StoreServer, do: str, *rest: object) -> tuple[bool, bytes]:
        done, answer = real(self, do, *rest)
        asked[do] += done
        return done, answer

    monkeypatch.setattr(StoreServer, "_do", counted)
    launch(print, 6, threads=1)
    # Its addresses told, and those of all; that it is connected, and that all are.
    assert asked == {"set": 2 * 6, "all": 6, "wait": 6}
