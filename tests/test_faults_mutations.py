"""A short part of the campaign of mutated files; the whole is ``python -m tests.faults_mutations``."""

from __future__ import annotations

import pytest

from tests.faults_mutations import campaign, failed, table


def test_mutated_files_are_refused_or_answered_as_what_they_are() -> None:
    rows = campaign(1, 150)
    assert len(rows) == 150
    assert not failed(rows), "\n".join(map(str, failed(rows)))
    # It is none that refuses everything, nor one that mutates nothing.
    verdicts = {row.verdict for row in rows}
    assert verdicts == {"refused", "equal", "another"}, table(rows)


@pytest.mark.slow
def test_two_thousand_more() -> None:
    rows = campaign(1_000_000, 2000)
    assert not failed(rows), "\n".join(map(str, failed(rows)))
