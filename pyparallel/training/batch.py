"""A batch cut over the replicas of a model, and their answers in the order of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyparallel.comm.collectives import all_gather_raw
from pyparallel.comm.group import Group
from pyparallel.cut.shares import part_sizes
from pyparallel.mesh import Mesh


def split_batch(batch: Any, mesh: Mesh) -> Any:
    """This dp replica's sequences of a batch that every rank has.

    Args:
        batch: a tensor [B, ...], or a mapping, tuple or list of such tensors, as a model takes them;
            what is no tensor stays as it is.

    Returns:
        The same, of B/dp consecutive rows.

    Raises:
        ValueError: B is not a multiple of dp, or not the same for all tensors.
    """
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in _tensors(batch)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"batch: expected tensors of one number of sequences, got "
            f"{', '.join(sorted(map(str, sizes))) or 'no tensor'}"
        )
    (size,) = sizes
    if size % mesh.dp.size:
        raise ValueError(
            f"batch: {size} sequences do not divide by dp={mesh.dp.size}; leave {size % mesh.dp.size} "
            f"out, or add {-size % mesh.dp.size} whose targets are all ignored"
        )
    own = size // mesh.dp.size
    return _map(batch, lambda tensor: tensor.narrow(0, mesh.dp.rank * own, own))


def part_of(rows: int, replicas: Group) -> range:
    """This replica's rows, nearly as many as any other's."""
    sizes = part_sizes(rows, replicas.size)
    start = sum(sizes[: replicas.rank])
    return range(start, start + sizes[replicas.rank])


def join_rows(
    own: Sequence[Sequence[int]], rows: int, width: int, replicas: Group, device: torch.device
) -> list[list[int]]:
    """All replicas' rows of up to ``width`` numbers, one replica's after another's.

    Args:
        own: this replica's, as many as :func:`part_of` gives it of ``rows``.
    """
    table = torch.zeros(len(own), 1 + width, dtype=torch.long)
    for line, numbers in zip(table, own, strict=True):
        line[0] = len(numbers)
        line[1 : 1 + len(numbers)] = torch.tensor(numbers, dtype=torch.long)
    sizes = part_sizes(rows, replicas.size)
    joined = all_gather_raw(table.to(device), replicas, sizes=sizes).tolist()
    return [line[1 : 1 + line[0]] for line in joined]


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map(batch, found.append)
    return found


def _map(batch: Any, change: Any) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _map(value, change) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_map(value, change) for value in batch)
    return batch
