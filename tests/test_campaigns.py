"""A short list of the faults of `make faults`; its times are judged there, not here."""

from __future__ import annotations

import pytest

from tests.campaigns import processes, strangers
from tests.campaigns.__main__ import show
from tests.campaigns.rows import Row


def test_faults_of_processes() -> None:
    rows = processes.campaign(7, 14)
    assert {row.phase for row in rows} == set(processes.PHASES)
    assert [row for row in rows if row.verdict != "ok"] == []


def test_strangers() -> None:
    rows = strangers.campaign(7, 2)
    assert [row for row in rows if row.verdict != "ok"] == []


@pytest.mark.parametrize(
    "row",
    [
        Row("a", "b", "c", "joined"),
        Row("a", "b", "c", "ok", "death", 1.2),
        Row("a", "b", "c", "ok", "stop", 1.2),
    ],
)
def test_what_is_found_fails_the_table(row: Row, capsys: pytest.CaptureFixture) -> None:
    assert show([Row("a", "b", "c"), row]) == 1
    assert "2 faults" in capsys.readouterr().out
