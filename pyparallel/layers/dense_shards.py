"""A shard as torch.distributed.checkpoint reads and writes it: as boxes of the dense tensor.

torch's planners ask a tensor which boxes of a global one it has (the protocol of ``_Checkpointable``).
Of a box that several ranks hold, the first one's is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from pyparallel.cut.shard import Sharding


class DenseShard(Tensor):
    """A shard, in its own memory, that tells which part of the dense tensor it is.

    Attributes:
        dense_shape: the dense tensor's.
        boxes: what this rank holds of it, by the first index of each.
        owned: those that no lower rank holds too.
    """

    dense_shape: torch.Size
    boxes: dict[torch.Size, Tensor]
    owned: list[torch.Size]

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Attributes. What makes another tensor of it, as staging does, would lose what it is.
        if func.__name__ == "__get__":
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        raise ValueError(
            f"{func.__name__}: expected dense tensors, got shards of a module that is cut, whose copies "
            f"(dcp.async_save) would not know what they are; use dcp.save, or use pyparallel.save"
        )

    @classmethod
    def of(cls, shard: Tensor, sharding: Sharding, rank: int) -> DenseShard:
        """The shard of rank ``rank`` as such a tensor; they share their memory."""
        dim, ranges = sharding.dim, sharding.ranges
        local = shard.detach()
        told = local.as_subclass(cls)
        shape = list(shard.shape)
        shape[dim] = sharding.length
        told.dense_shape = torch.Size(shape)
        told.boxes, told.owned = {}, []
        lower = {held for other in ranges[:rank] for held in other}
        pieces = local.split([stop - start for start, stop in ranges[rank]], dim)
        for held, piece in zip(ranges[rank], pieces, strict=True):
            if held[0] == held[1]:
                # It would begin where another rank's begins.
                continue
            first = [0] * local.dim()
            first[dim] = held[0]
            told.boxes[torch.Size(first)] = piece
            if held not in lower:
                told.owned.append(torch.Size(first))
        return told

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.dense_shape if dim is None else self.dense_shape[dim]

    def __create_write_items__(self, fqn: str, shard: Tensor) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, first),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(first, self.boxes[first]),
                    properties=TensorProperties.create_from_tensor(self.boxes[first]),
                    size=self.dense_shape,
                ),
            )
            for first in self.owned
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(first, box) for first, box in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.boxes[index.offset]


def _chunk(first: torch.Size, box: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=first, sizes=box.size())
