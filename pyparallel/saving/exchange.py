"""The ranks of a save or a restore agree: torch.distributed.checkpoint's steps, told in JSON.

torch's own drivers of these steps pickle the plans, the results and the errors, and unpickle what every
peer sends. Here a rank tells the boxes it holds, where it wrote them, or in one line what went wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from pyparallel.checkpoint.format import CheckpointError
from pyparallel.comm.exchange import gather_objects
from pyparallel.comm.peer_watch import naming_lost_peers

T = TypeVar("T")


def together(work: Callable[[], T], what: str = "") -> T:
    """The result of ``work``, or on every rank the error of the first rank that has one.

    Args:
        what: is worked on, for errors that do not name it.
    """
    return _exchange(work, lambda result: None, what)[0]


def write_pieces(writer: StorageWriter, planner: SavePlanner, what: str) -> None:
    """Write what the ranks' planners hold; called by every rank.

    Raises:
        CheckpointError: on every rank, if any rank fails.
    """
    rank = dist.get_rank()

    def plan() -> SavePlan:
        planner.set_up_planner({}, writer.storage_meta(), rank == 0)
        writer.set_up_storage_writer(rank == 0)
        return writer.prepare_local_plan(planner.create_local_plan())

    _, told = _exchange(plan, _plan_told, what)
    plans, metadata = together(lambda: planner.create_global_plan(list(map(_plan, told))), what)

    def prepare() -> list[Any]:
        prepared = writer.prepare_global_plan(plans) if rank == 0 else []
        return [plan.storage_data for plan in prepared]

    _, told = _exchange(prepare, lambda data: data, what)
    own = planner.finish_plan(replace(plans[rank], storage_data=told[0][rank]))
    _, told = _exchange(lambda: writer.write_data(own, planner).wait(), _results_told, what)
    results = [[_result(*result) for result in results] for results in told]

    def finish() -> None:
        if rank == 0:
            writer.finish(metadata, results)

    together(finish, what)


def read_pieces(reader: StorageReader, planner: LoadPlanner, what: str) -> None:
    """Read what the ranks' planners want; called by every rank.

    Raises:
        CheckpointError: on every rank, if any rank fails. Nothing was changed where the plans fail.
    """

    def plan() -> LoadPlan:
        metadata = reader.read_metadata()
        planner.set_up_planner({}, metadata, dist.get_rank() == 0)
        reader.set_up_storage_reader(metadata, dist.get_rank() == 0)
        return reader.prepare_local_plan(planner.create_local_plan())

    own, told = _exchange(plan, lambda plan: plan.planner_data, what)
    # What the ranks want together is checked; nobody needs to know which parts.
    everyone = [LoadPlan([], planner_data=names) for names in told]
    together(lambda: reader.prepare_global_plan(planner.create_global_plan(everyone)), what)
    together(lambda: reader.read_data(planner.finish_plan(own), planner).wait(), what)


def _exchange(work: Callable[[], T], tell: Callable[[T], Any], what: str) -> tuple[T, list[Any]]:
    """The result of ``work``, and what every rank tells of its own; or the first rank's error."""
    result, told, error = None, None, None
    try:
        result = work()
        told = tell(result)
    except Exception as caught:
        error = caught
    own = None if error is None else _described(error, what)
    with naming_lost_peers(f"save or restore of {what}" if what else "save or restore"):
        everyone = gather_objects(dist.group.WORLD, [own, told])
    for text, _ in everyone:
        if text is not None:
            raise CheckpointError(text) from error
    return result, [value for _, value in everyone]


def _described(error: Exception, what: str) -> str:
    if isinstance(error, ValueError):
        return str(error)
    where = f"{what}: " if what else ""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{where}rank {dist.get_rank()}: {text}"


def _plan_told(plan: SavePlan) -> list[Any]:
    items = [
        [
            item.index.fqn,
            list(item.index.offset),
            list(item.tensor_data.chunk.sizes),
            list(item.tensor_data.size),
            str(item.tensor_data.properties.dtype).removeprefix("torch."),
        ]
        for item in plan.items
    ]
    return [items, plan.planner_data, plan.storage_data]


def _plan(told: list[Any]) -> SavePlan:
    items = []
    for name, offsets, sizes, shape, dtype in told[0]:
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        properties = TensorProperties(dtype=getattr(torch, dtype))
        data = TensorWriteData(chunk, properties, torch.Size(shape))
        index = MetadataIndex(name, tuple(offsets))
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
    return SavePlan(items, planner_data=told[1], storage_data=told[2])


def _results_told(results: list[WriteResult]) -> list[Any]:
    return [[r.index.fqn, list(r.index.offset), r.size_in_bytes, r.storage_data] for r in results]


def _result(name: str, offsets: list[int], size: int, file: Any) -> WriteResult:
    return WriteResult(MetadataIndex(name, torch.Size(offsets)), size, file)
