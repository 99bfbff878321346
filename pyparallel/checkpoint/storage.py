"""The boxes that one rank writes and reads: safetensors files, of which one has any number of boxes.

Nothing is pickled, and a checkpoint appears whole or not at all: see :mod:`pyparallel.checkpoint.place`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from pyparallel.checkpoint.grid import Chunk
from pyparallel.checkpoint.index import SAVE
from pyparallel.checkpoint.paths import to_disk
from pyparallel.checkpoint.sharded import ShardedCheckpoint

# Boxes that are no plain memory of the host are copied before they are written: so much at a time.
COPIED_BYTES = 256 << 20


def file_name(rank: int, number: int, suffix: str) -> str:
    """What one of a rank's files is called."""
    return f"rank_{rank:05}_{number:02}{suffix}.safetensors"


def write_boxes(
    boxes: Iterable[tuple[str, Tensor]],
    working: Path,
    rank: int,
    suffix: str,
    save: str | None = None,
) -> list[tuple[int, int]]:
    """Write a rank's boxes, in their order, by their names in the file.

    Args:
        save: what the files are to name as theirs, if anything.

    Returns:
        For each file that was needed the number of its boxes, and its bytes.
    """
    written: list[tuple[int, int]] = []
    tensors: dict[str, Tensor] = {}
    copied = 0

    def finish_file() -> None:
        file = working / file_name(rank, len(written), suffix)
        save_file(tensors, file, None if save is None else {SAVE: save})
        to_disk(file)
        written.append((len(tensors), file.stat().st_size))
        tensors.clear()

    for key, value in boxes:
        plain = value.cpu().contiguous()
        copied += 0 if plain.data_ptr() == value.data_ptr() else value.numel() * value.itemsize
        tensors[key] = plain
        if copied >= COPIED_BYTES:
            finish_file()
            copied = 0
    if tensors:
        finish_file()
    return written


@dataclass(frozen=True)
class Read:
    """A part of a stored box that is wanted.

    Attributes:
        starts: where in the box it begins.
        out: where it goes.
    """

    name: str
    chunk: Chunk
    starts: list[int]
    out: Tensor


def read_boxes(checkpoint: ShardedCheckpoint, reads: Iterable[Read]) -> None:
    """Read parts of boxes, each straight into its place: file by file, and forward in each."""
    for read in sorted(reads, key=lambda read: checkpoint.place(read.name, read.chunk)):
        checkpoint.read_chunk(read.name, read.chunk, read.starts, read.out)
    checkpoint.close()
