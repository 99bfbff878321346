"""``save`` and ``restore``: a training run's model and optimizer, on any mesh.

Every tensor is kept as the dense tensor it is a part of, under its
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

from pyparallel.checkpoint.grid import box_key
from pyparallel.checkpoint.paths import resolve
from pyparallel.checkpoint.place import Place, left_behind
from pyparallel.checkpoint.sharded import INDEX, Index, ShardedCheckpoint, is_sharded
from pyparallel.checkpoint.source import CheckpointError
from pyparallel.checkpoint.storage import Read, file_name, read_boxes, write_boxes
from pyparallel.mesh import Mesh
from pyparallel.saving.exchange import exchange, exchange_shared, together
from pyparallel.saving.files import source_of, write_files
from pyparallel.saving.hosts import check_seen, first_of_folder, on_this_host
from pyparallel.saving.names import named_tensors, unwrap
from pyparallel.saving.optimizer import empty_optimizer, merge_optimizers, optimizer_pieces
from pyparallel.saving.pieces import Piece
from pyparallel.saving.plan import plan, stored, written_by
from pyparallel.saving.told import kinds_of, tell
from pyparallel.saving.wanted import check_extra, reads_of

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
    per_host: bool = False,
) -> None:
    """Write a sharded checkpoint; called by every rank of the mesh.

    A rank writes what it holds; of what several hold one writes a copy. Where that is no plain memory on
    the host a rank copies up to 256 MiB at a time. ``folder`` appears at the end, whole.

    Args:
        model: a :class:`Decoder`, a parallelized transformers model or any module with sharded layers in
            it; may be wrapped by DDP, cut by ``fully_shard``, or compiled. Several stages as a list.
        folder: on a file system that all ranks share, unless ``per_host``.
        optimizer: its state and options are kept too.
        extra: anything else, as JSON can hold it (rank 0's is kept); :func:`restore` returns it.
        source: the folder or GGUF file whose config and tokenizer are kept too, so that
            :func:`pyparallel.load` can open the checkpoint; by default the one the model is from.
        overwrite: replace a checkpoint that is there: the files that pyparallel wrote, and no other; a
            folder that it did not write is refused. See :mod:`pyparallel.checkpoint.place`.
        per_host: each host has a ``folder`` of its own, for what its ranks write. Put together by
            :func:`pyparallel.saving.merge.merge` (``pyparallel merge``) they are the checkpoint.

    Raises:
        CheckpointError: on every rank, if any rank fails.
    """
    folder = resolve(folder)
    models = [model] if isinstance(model, nn.Module) else list(model)
    rank, what = dist.get_rank(), str(folder)
    first = first_of_folder(per_host=per_host)
    # The first rank's alone; the others are told where it is.
    place: Place | None = None
    kept: dict[str, Any] = {}

    def hold() -> tuple[list[Piece], Any]:
        nonlocal place
        kept.update(_json("extra", dict(extra or {})))
        named = named_tensors(models, mesh)
        pieces = [piece for tensor in named for piece in tensor.pieces(mesh, owned=True)]
        state = None
        if optimizer is not None:
            more, state = optimizer_pieces(optimizer, named, mesh)
            pieces += more
        if rank == first:
            place = Place(folder, overwrite=overwrite)
            if per_host and place.suffix:
                raise CheckpointError(
                    f"{folder}: holds other files too; with per_host expected a folder of its own"
                )
        return pieces, state

    def tell_held(held: tuple[list[Piece], Any]) -> tuple[Any, Any]:
        pieces, state = held
        kinds, boxes = tell(pieces)
        made = place and [str(place.working), place.suffix, place.token]
        return [kinds, state], [boxes, made]

    try:
        (pieces, _), told, shared = exchange_shared(hold, tell_held, what)
        working, suffix, _ = told[first][1][1]
        of_all, token = Path(told[0][1][1][0]), told[0][1][1][2]
        # Parts may meet those of another save; files that lie in one folder from the first don't.
        save_name = token if per_host else None
        held = [(number, boxes) for number, (boxes, _) in told]
        cuts = together(lambda: plan([kinds_of(kinds) for kinds, _ in shared], held, what), what)

        def write() -> list[tuple[int, int]]:
            check_seen(folder, Path(working), first=first, of_all=of_all)
            own = {(piece.name, piece.offsets): piece.tensor for piece in pieces}
            boxes = (
                (box_key(name, box.offsets), own[name, box.offsets])
                for name, box in written_by(rank, cuts)
            )
            return write_boxes(boxes, Path(working), rank, suffix, save_name)

        _, written = exchange(write, lambda sizes: sizes, what)

        def finish() -> None:
            if place is None:
                return
            if rank != 0:
                # The index is one, and lies with rank 0's part.
                place.appear(file_name(rank, 0, suffix))
                return
            states = None if optimizer is None else merge_optimizers(part for _, part in shared)
            tensors, files = stored(cuts, written, suffix, what)
            index = Index(tensors, files, {"extra": kept, "optimizer": states}, save_name)
            (place.working / INDEX).write_text(index.to_json())
            chain = unwrap(models[0])
            write_files(place.working, chain[-1], source_of(source, chain))
            place.appear(INDEX)

        together(finish, what)
    except CheckpointError:
        # All ranks have failed together. Where one has died the others may still write.
        if place is not None:
            place.close()
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
    what = str(folder)
    where = on_this_host()
    checkpoint = together(lambda: _open(folder, where), what)
    loaded: dict[str, Any] = {}

    def wanted() -> tuple[list[Read], list[str]]:
        named = named_tensors(models, mesh)
        pieces = [piece for tensor in named for piece in tensor.pieces(mesh, owned=False)]
        if optimizer is not None:
            loaded["optimizer"], more = empty_optimizer(
                optimizer, named, checkpoint.index, mesh, what
            )
            pieces += more
        return reads_of(checkpoint, pieces, what), sorted({piece.name for piece in pieces})

    (reads, _), _, names = exchange_shared(wanted, lambda found: (found[1], None), what)
    together(lambda: check_extra(checkpoint, names, what, optimizer is not None), what)
    together(lambda: read_boxes(checkpoint, reads), what)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    return checkpoint.index.state.get("extra", {})


def _open(folder: Path, where: str) -> ShardedCheckpoint:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder{where}{left_behind(folder)}")
    if not is_sharded(folder) and any(folder.glob("rank_*.safetensors")):
        raise CheckpointError(
            f"{folder}: a part of a checkpoint{where}, without its index; put together what each host "
            f"has: pyparallel merge"
        )
    if not is_sharded(folder):
        raise CheckpointError(
            f"{folder}: not written by pyparallel.save(); read other checkpoints with load()"
        )
    return ShardedCheckpoint(folder, part=dist.get_rank(), of=dist.get_world_size())


def _json(name: str, value: T) -> T:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected what JSON can hold ({error})") from None
