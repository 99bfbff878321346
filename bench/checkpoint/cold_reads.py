"""What a rank that holds an eighth of a matrix takes from the disk: bf16 matrices of several widths.

    make bench-cold_reads

A file for each matrix, dropped from the page cache before each read. A line for each width and cut: the
bytes of the rank's share and those that the kernel read for it (``read_bytes`` of /proc/self/io; 0 where
the folder lies in memory), both in MB, and the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from pyparallel.checkpoint.source import open_checkpoint
from pyparallel.cut.shard import Sharding, even_parts

RANKS = 8
ROWS = 2048
# The widths of o_proj and down_proj in Llama 3.2 1B, Llama 2 7B, and Llama 3.1 405B.
WIDTHS = (2048, 8192, 4096, 11008, 16384, 53248)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="on the disk that is asked about")
    options = parser.parse_args()
    for width in WIDTHS:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            file = Path(name) / "model.safetensors"
            save_file({"a": torch.ones(ROWS, width, dtype=torch.bfloat16)}, file)
            cuts = {"rows": even_parts(ROWS, RANKS), "columns": even_parts(width, RANKS, dim=1)}
            for cut, sharding in cuts.items():
                print(
                    json.dumps({"width": width, "cut": cut, **measured(file, sharding)}), flush=True
                )


def measured(file: Path, sharding: Sharding) -> dict[str, float]:
    """One rank's read of its part, from the disk."""
    drop(file)
    before, begin = read_bytes(), time.perf_counter()
    shard = open_checkpoint(file.parent).read("a", sharding, RANKS // 2)
    seconds = time.perf_counter() - begin
    return {
        "share_mb": round(shard.numel() * shard.itemsize / 1e6, 2),
        "read_mb": round((read_bytes() - before) / 1e6, 2),
        "whole_mb": round(file.stat().st_size / 1e6, 2),
        "s": round(seconds, 3),
    }


def drop(file: Path) -> None:
    """Have nothing of a file in the page cache."""
    with file.open("rb") as opened:
        os.fsync(opened)
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes() -> int:
    """What this process has had read from disks."""
    told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(told["read_bytes"])


if __name__ == "__main__":
    main()
