"""Where torch.distributed.checkpoint's data goes: safetensors files of boxes, and an index in JSON.

torch's own file storage keeps its metadata as a pickle, and its safetensors storage holds one box of a
tensor in a file and writes no index of several ranks' boxes. Here nothing is pickled, a rank's file has
any number of boxes, and a checkpoint appears whole or not at all: see
:mod:`pyparallel.checkpoint.place`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pyparallel.checkpoint.paths import to_disk
from pyparallel.checkpoint.place import Place
from pyparallel.checkpoint.sharded import INDEX, Chunk, Index, ShardedCheckpoint, Stored

# Boxes that are no plain memory of the host are copied before they are written: so much at a time.
COPIED_BYTES = 256 << 20


class PieceWriter(StorageWriter):
    """Writes a folder that :class:`ShardedCheckpoint` reads.

    Args:
        folder: what appears at the end.
        rank: of the job.
        add_files: called on one rank with the folder before it is given its name.
        overwrite: replace a folder that is there.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        add_files: Callable[[Path], None],
        *,
        overwrite: bool,
    ) -> None:
        self._folder = folder
        self._rank = rank
        self._add_files = add_files
        self._overwrite = overwrite
        # The coordinator's alone; the others are told where it is in their plans.
        self._place: Place | None = None

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self._place = Place(self._folder, overwrite=self._overwrite)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        where = str(self._place.working), self._place.suffix
        return [replace(plan, storage_data=where) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        tensors: dict[str, torch.Tensor] = {}
        copied = number = 0
        working, suffix = plan.storage_data
        for place, item in enumerate(plan.items, 1):
            file = f"rank_{self._rank:05}_{number:02}{suffix}.safetensors"
            value = planner.resolve_data(item)
            size = value.numel() * value.itemsize
            plain = value.cpu().contiguous()
            copied += 0 if plain.data_ptr() == value.data_ptr() else size
            chunk = Chunk(file, tuple(item.index.offset), tuple(value.shape))
            tensors[chunk.key(item.index.fqn)] = plain
            results.append(WriteResult(item.index, size, file))
            if copied >= COPIED_BYTES or place == len(plan.items):
                save_file(tensors, Path(working) / file)
                to_disk(Path(working) / file)
                tensors.clear()
                copied, number = 0, number + 1
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {result.index: result.storage_data for found in results for result in found}
        tensors = {}
        for name, stored in sorted(metadata.state_dict_metadata.items()):
            chunks = tuple(
                Chunk(files[MetadataIndex(name, c.offsets)], tuple(c.offsets), tuple(c.sizes))
                for c in stored.chunks
            )
            tensors[name] = Stored(tuple(stored.size), stored.properties.dtype, chunks)
        working = self._place.working
        sizes = {name: (working / name).stat().st_size for name in sorted(set(files.values()))}
        (working / INDEX).write_text(Index(tensors, sizes, metadata.planner_data).to_json())
        self._add_files(working)
        self._place.appear(INDEX)

    def close(self) -> None:
        """Remove what a failure left, when no rank writes any more."""
        if self._place is not None:
            self._place.close()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class PieceReader(StorageReader):
    """Reads the planned parts of a checkpoint's boxes, each straight into its place."""

    def __init__(self, checkpoint: ShardedCheckpoint) -> None:
        self._checkpoint = checkpoint

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=stored.dtype),
                    torch.Size(stored.shape),
                    [
                        ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes))
                        for c in stored.chunks
                    ],
                )
                for name, stored in self._checkpoint.index.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        chunks = {
            MetadataIndex(name, chunk.offsets): chunk
            for name, stored in self._checkpoint.index.tensors.items()
            for chunk in stored.chunks
        }
        # One file after another, so that each is opened few times.
        for item in sorted(plan.items, key=lambda item: chunks[item.storage_index].file):
            out = planner.resolve_tensor(item)
            self._checkpoint.read_chunk(
                item.storage_index.fqn, chunks[item.storage_index], item.storage_offsets, out
            )
            planner.commit_tensor(item, out)
        self._checkpoint.close()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True
