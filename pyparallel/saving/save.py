"""``save`` and ``restore``: a training run's model and optimizer, on any mesh.

On torch.distributed.checkpoint. Every tensor is kept as the dense tensor it is a part of, under its
Hugging Face name; a rank writes the boxes it holds, and reads the parts of boxes that it needs. So what
one mesh saved loads on any other: another tp, pp, cp, dp or FSDP, with sequence parallelism or without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from pyparallel.checkpoint.paths import resolve
from pyparallel.checkpoint.place import left_behind
from pyparallel.checkpoint.sharded import ShardedCheckpoint, is_sharded
from pyparallel.checkpoint.source import CheckpointError
from pyparallel.checkpoint.storage import PieceReader, PieceWriter
from pyparallel.mesh import Mesh
from pyparallel.saving.exchange import read_pieces, together, write_pieces
from pyparallel.saving.files import source_of, write_files
from pyparallel.saving.names import named_tensors, unwrap
from pyparallel.saving.optimizer import empty_optimizer, merge_optimizers, optimizer_pieces
from pyparallel.saving.planner import Held, PieceLoadPlanner, PieceSavePlanner

T = TypeVar("T")


def save(
    model: nn.Module | Sequence[nn.Module],
    folder: str | Path,
    mesh: Mesh,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a sharded checkpoint; called by every rank of the mesh.

    A rank writes what it holds; of what several hold one writes a copy. Where that is no plain memory on
    the host a rank copies up to 256 MiB at a time. ``folder`` appears at the end, whole.

    Args:
        model: a :class:`Decoder`, a parallelized transformers model or any module with sharded layers in
            it; may be wrapped by DDP, cut by ``fully_shard``, or compiled. Several stages as a list.
        folder: on a file system that all ranks share.
        optimizer: its state and options are kept too.
        extra: anything else, as JSON can hold it (rank 0's is kept); :func:`restore` returns it.
        source: the folder or GGUF file whose config and tokenizer are kept too, so that
            :func:`pyparallel.load` can open the checkpoint; by default the one the model is from.
        overwrite: replace a checkpoint that is there: the files that pyparallel wrote, and no other; a
            folder that it did not write is refused. See :mod:`pyparallel.checkpoint.place`.

    Raises:
        CheckpointError: on every rank, if any rank fails.
    """
    folder = resolve(folder)
    models = [model] if isinstance(model, nn.Module) else list(model)

    def hold() -> Held:
        named = named_tensors(models, mesh)
        pieces = [piece for tensor in named for piece in tensor.pieces(mesh, owned=True)]
        state: dict[str, Any] = {"extra": _json("extra", dict(extra or {})), "optimizer": None}
        if optimizer is not None:
            more, state["optimizer"] = optimizer_pieces(optimizer, named, mesh)
            pieces += more
        return Held(pieces, state)

    def merge(states: list[dict[str, Any]]) -> dict[str, Any]:
        merged = dict(states[0])
        if optimizer is not None:
            merged["optimizer"] = merge_optimizers(state["optimizer"] for state in states)
        return merged

    def add_files(written: Path) -> None:
        chain = unwrap(models[0])
        write_files(written, chain[-1], source_of(source, chain))

    writer = PieceWriter(folder, dist.get_rank(), add_files, overwrite=overwrite)
    try:
        write_pieces(writer, PieceSavePlanner(hold, merge), str(folder))
    except CheckpointError:
        # All ranks have failed together. Where one has died the others may still write.
        writer.close()
        raise


def restore(
    model: nn.Module | Sequence[nn.Module],
    folder: str | Path,
    mesh: Mesh,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """Read a sharded checkpoint into a model, whichever mesh wrote it; called by every rank.

    A rank reads only the parts of its own pieces, straight into the model's memory, converted to its
    dtype. Nothing is changed where the checkpoint does not fit the model.

    Args:
        model, folder: as :func:`save` takes them.
        optimizer: gets the saved state and options (learning rates, ...). Its parameters have to be
            grouped as they were.

    Returns:
        What was saved as ``extra``.

    Raises:
        CheckpointError: on every rank, if any rank fails: a tensor is missing, extra or mis-shaped, a
            file is broken. The message names it.
    """
    folder = Path(folder).absolute()
    models = [model] if isinstance(model, nn.Module) else list(model)
    checkpoint = together(lambda: _open(folder), str(folder))
    loaded: dict[str, Any] = {}

    def hold() -> Held:
        named = named_tensors(models, mesh)
        pieces = [piece for tensor in named for piece in tensor.pieces(mesh, owned=False)]
        if optimizer is not None:
            loaded["optimizer"], more = empty_optimizer(
                optimizer, named, checkpoint.index, mesh, str(folder)
            )
            pieces += more
        return Held(pieces)

    planner = PieceLoadPlanner(hold, str(folder), with_optimizer=optimizer is not None)
    read_pieces(PieceReader(checkpoint), planner, str(folder))
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return checkpoint.index.state.get("extra", {})


def _open(folder: Path) -> ShardedCheckpoint:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder{left_behind(folder)}")
    if not is_sharded(folder):
        raise CheckpointError(
            f"{folder}: not written by pyparallel.save(); read other checkpoints with load()"
        )
    return ShardedCheckpoint(folder)


def _json(name: str, value: T) -> T:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected what JSON can hold ({error})") from None
