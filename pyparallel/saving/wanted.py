"""What a rank reads of a checkpoint: the parts of stored boxes that its own pieces are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.checkpoint.sharded import OPTIMIZER, ShardedCheckpoint
from pyparallel.checkpoint.storage import Read
from pyparallel.saving.pieces import Piece


def reads_of(checkpoint: ShardedCheckpoint, pieces: Iterable[Piece], what: str) -> list[Read]:
    """The parts of boxes that pieces are read from; no other box is looked at.

    Raises:
        CheckpointError: a tensor is missing, or has another shape, or not all of a piece is there.
    """
    reads = []
    for piece in pieces:
        found = checkpoint.index.tensors.get(piece.name)
        if found is None:
            raise CheckpointError(f"{what}: tensor {piece.name} is missing")
        if found.shape != piece.shape:
            raise CheckpointError(
                f"{what}: tensor {piece.name} has shape {found.shape}, expected {piece.shape}"
            )
        parts = [
            Read(piece.name, *part)
            for part in checkpoint.parts(piece.name, piece.offsets, piece.tensor)
        ]
        if sum(read.out.numel() for read in parts) != piece.tensor.numel():
            raise CheckpointError(f"{what}: tensor {piece.name} is not whole")
        reads += parts
    return reads


def check_extra(
    checkpoint: ShardedCheckpoint, names: Sequence[Sequence[str]], what: str, with_optimizer: bool
) -> None:
    """A checkpoint has no tensors but those that some rank wants.

    Args:
        names: that the ranks want.
        with_optimizer: the optimizer's are wanted too.

    Raises:
        CheckpointError: it has.
    """
    extra = set(checkpoint.index.tensors).difference(*names)
    if not with_optimizer:
        extra = {name for name in extra if not name.startswith(OPTIMIZER)}
    if extra:
        raise CheckpointError(
            f"{what}: tensor {min(extra)} is not one of this model"
            + (f" (nor are {len(extra) - 1} others)" if len(extra) > 1 else "")
        )
