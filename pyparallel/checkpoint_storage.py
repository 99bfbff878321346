"""Where torch.distributed.checkpoint's data goes: safetensors files of boxes, and an index in JSON.

torch's own file storage keeps its metadata as a pickle, and its safetensors storage holds one box of a
tensor in a file and writes no index of several ranks' boxes. Here nothing is pickled, a rank's file has
any number of boxes, and a checkpoint appears whole or not at all: it is written beside its place and
renamed at the end.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
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

from pyparallel.checkpoint_format import CheckpointError
from pyparallel.sharded_checkpoint import INDEX, Chunk, Index, ShardedCheckpoint, Stored

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
        self._unfinished = unfinished(folder)
        self._rank = rank
        self._add_files = add_files
        self._overwrite = overwrite

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not is_coordinator:
            return
        if self._folder.exists() and not self._overwrite:
            raise CheckpointError(
                f"{self._folder}: is there already; choose another folder, or overwrite=True"
            )
        if self._unfinished.exists():
            shutil.rmtree(self._unfinished)
        self._unfinished.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        tensors: dict[str, torch.Tensor] = {}
        copied = number = 0
        for place, item in enumerate(plan.items, 1):
            file = f"rank_{self._rank:05}_{number:02}.safetensors"
            value = planner.resolve_data(item)
            size = value.numel() * value.itemsize
            plain = value.cpu().contiguous()
            copied += 0 if plain.data_ptr() == value.data_ptr() else size
            chunk = Chunk(file, tuple(item.index.offset), tuple(value.shape))
            tensors[chunk.key(item.index.fqn)] = plain
            results.append(WriteResult(item.index, size, file))
            if copied >= COPIED_BYTES or place == len(plan.items):
                save_file(tensors, self._unfinished / file)
                _to_disk(self._unfinished / file)
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
        sizes = {
            name: (self._unfinished / name).stat().st_size for name in sorted(set(files.values()))
        }
        index = self._unfinished / INDEX
        index.write_text(Index(tensors, sizes, metadata.planner_data).to_json())
        _to_disk(index)
        self._add_files(self._unfinished)
        appear(self._unfinished, self._folder)

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


def unfinished(folder: Path) -> Path:
    """Where ``folder`` is written until it is whole."""
    return folder.with_name(f".{folder.name}.unfinished")


def appear(written: Path, folder: Path) -> None:
    """Give a folder that was written its name, in the place of one that is there."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    written.rename(folder)
    _to_disk(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
