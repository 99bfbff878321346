"""A short part of the campaign of mutated files; the whole is ``python -m tests.faults_mutations``."""

from __future__ import annotations

import pytest

from tests.faults_mutations import campaign, failed, judged, table

# Seeds that failed once: a file's name, a kind of RoPE and a token of 5,000 characters in the message;
# weights of 1e38 that overflow; an eps of 1, no float; a billion heads; an unknown word that is in no
# vocabulary; a key's name.
FOUND = (231, 1242, 1438, 5382, 5482, 6432, 7707, 51986, 54006, 109062)


def test_mutated_files_are_refused_or_answered_as_what_they_are() -> None:
    rows = judged([*range(1, 151), *FOUND])
    assert len(rows) == 160
    assert not failed(rows), "\n".join(map(str, failed(rows)))
    # It is none that refuses everything, nor one that mutates nothing.
    verdicts = {row.verdict for row in rows}
    assert verdicts == {"refused", "equal", "another"}, table(rows)


@pytest.mark.slow
def test_two_thousand_more() -> None:
    rows = campaign(1_000_000, 2000)
    assert not failed(rows), "\n".join(map(str, failed(rows)))
