"""``launch()`` under torchrun: a wrong variable is named in a line."""

from __future__ import annotations

import pytest

from pyparallel.ranks.joined import run_joined


@pytest.mark.parametrize("rank", ["one", "2", ""])
def test_a_wrong_rank_is_named(monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    names = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="RANK: expected 0 to 1, got "):
        run_joined(lambda: None, 2, (), threads=None, timeout_s=1, on_report=None)
