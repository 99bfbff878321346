"""The mutated files of tests/faults_mutations, as rows of this table."""

from __future__ import annotations

from tests.campaigns.rows import Row
from tests.faults_mutations import campaign as mutated


def campaign(seed: int, count: int) -> list[Row]:
    """``count`` mutations of GGUF, safetensors, indexes, configs and tokenizer files."""
    return [
        Row(
            "mutations",
            row.files[:11],
            "mutated",
            "ok" if row.is_good else "hung" if row.verdict == "hung" else "wrong",
            "",
            row.seconds,
            f"seed {row.seed}, {row.what}: {row.verdict}: {row.detail}",
        )
        for row in mutated(seed, count)
    ]
