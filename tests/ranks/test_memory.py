"""What a rank has of its own: not copies of what it inherited."""

from __future__ import annotations

import gc
from pathlib import Path

from pyparallel.launch import launch

# Without the server's freeze a collection copied 40 MB.
FEW_BYTES = 8 << 20


def own_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def copied_by_a_collection() -> int:
    before = own_bytes()
    gc.collect()
    return own_bytes() - before


def test_a_collection_copies_nothing_that_was_inherited() -> None:
    for copied in launch(copied_by_a_collection, 2, threads=1):
        assert copied < FEW_BYTES
