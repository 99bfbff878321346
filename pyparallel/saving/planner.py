"""How torch.distributed.checkpoint learns what each rank holds: its planners, made of pieces.

A planner is torch's documented way to say which boxes of which tensors a rank writes and reads; it takes
several boxes of one tensor a rank, transposed views and parts that FSDP cut without a tensor subclass.
What a rank has to do to name its pieces happens inside the planner, so that torch's exchange of
failures reports it on every rank.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.checkpoint.sharded import OPTIMIZER
from pyparallel.saving.pieces import Piece


@dataclass(frozen=True)
class Held:
    """What a rank writes, or fills.

    Attributes:
        pieces: of tensors.
        state: what is no tensor, as JSON; writing only.
    """

    pieces: list[Piece]
    state: Any = None


class PieceSavePlanner(DefaultSavePlanner):
    """Plans the writing of each rank's pieces; equal ones are written by one rank.

    Args:
        hold: makes this rank's part.
        merge: makes one state of all ranks'.
    """

    def __init__(self, hold: Callable[[], Held], merge: Callable[[list[Any]], Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._hold = hold
        self._merge = merge
        self._pieces: dict[MetadataIndex, Piece] = {}

    def create_local_plan(self) -> SavePlan:
        held = self._hold()
        self._pieces = {MetadataIndex(piece.name, piece.offsets): piece for piece in held.pieces}
        items = []
        for index, piece in self._pieces.items():
            properties = TensorProperties(dtype=piece.tensor.dtype)
            data = TensorWriteData(_chunk(piece), properties, torch.Size(piece.shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data=held.state)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        states = [plan.planner_data for plan in all_plans]
        plans, metadata = super().create_global_plan(all_plans)
        metadata = replace(metadata, planner_data=self._merge(states))
        return [replace(plan, planner_data=None) for plan in plans], metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._pieces[write_item.index].tensor


class PieceLoadPlanner(LoadPlanner):
    """Plans the reading of the parts of a checkpoint's boxes that this rank's pieces need.

    Args:
        hold: makes this rank's part.
        what: of the checkpoint, for messages.
        with_optimizer: the optimizer's tensors are wanted too.
    """

    def __init__(self, hold: Callable[[], Held], what: str, *, with_optimizer: bool) -> None:
        self._hold = hold
        self._what = what
        self._with_optimizer = with_optimizer
        self._pieces: list[Piece] = []
        self._metadata: Metadata | None = None

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        self._pieces = self._hold().pieces
        stored: Mapping[str, Any] = self._metadata.state_dict_metadata
        items = []
        for number, piece in enumerate(self._pieces):
            if piece.name not in stored:
                raise CheckpointError(f"{self._what}: tensor {piece.name} is missing")
            found = stored[piece.name]
            if tuple(found.size) != piece.shape:
                raise CheckpointError(
                    f"{self._what}: tensor {piece.name} has shape {tuple(found.size)}, "
                    f"expected {piece.shape}"
                )
            reads = create_read_items_for_chunk_list(piece.name, found, [_chunk(piece)])
            if sum(math.prod(item.lengths) for item in reads) != piece.tensor.numel():
                raise CheckpointError(f"{self._what}: tensor {piece.name} is not whole")
            target = MetadataIndex(piece.name, piece.offsets, number)
            items += [replace(item, dest_index=target) for item in reads]
        return LoadPlan(items, planner_data=sorted({piece.name for piece in self._pieces}))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        wanted = {name for plan in global_plan for name in plan.planner_data}
        extra = set(self._metadata.state_dict_metadata) - wanted
        if not self._with_optimizer:
            extra = {name for name in extra if not name.startswith(OPTIMIZER)}
        if extra:
            raise CheckpointError(
                f"{self._what}: tensor {min(extra)} is not one of this model"
                + (f" (nor are {len(extra) - 1} others)" if len(extra) > 1 else "")
            )
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise CheckpointError(f"{self._what}: {read_item.dest_index.fqn} is no tensor")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        piece = self._pieces[read_item.dest_index.index]
        box = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return piece.tensor[tuple(slice(start, start + size) for start, size in box)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        # Read straight into the model's memory.
        pass


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape)
