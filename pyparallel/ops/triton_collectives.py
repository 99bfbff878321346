"""The collectives of pyparallel.kernels, where ``triton`` is asked for by name.

Sums and gathers of fp32, fp16 and bf16 over ranks that reach each other's memory
(:mod:`pyparallel.comm.symmetric_regions`). Everything else (other dtypes, maxima, groups over machines)
is not offered here and stays with the group's own engine. No autograd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.comm.communicator import PeerError
from pyparallel.comm.group import Group
from pyparallel.comm.symmetric_regions import reason_against as region_reason
from pyparallel.comm.symmetric_regions import symmetric_memory
from pyparallel.ops.triton_ops import reason_against

if TYPE_CHECKING:
    from pyparallel.kernels.collective.symmetric import SymmetricMemory


def peers_reason(x: Tensor, group: Group) -> str | None:
    """Why the kernels that communicate can't run, or None."""
    if backend.chosen() != "triton":
        return "kernels that communicate run only where triton is asked for"
    if group.size == 1:
        return "the group has one rank"
    if torch.compiler.is_compiling():
        return "not part of a compiled graph"
    return reason_against(x) or region_reason(x, group)


@contextmanager
def peers(x: Tensor, group: Group, num_bytes: int) -> Iterator[SymmetricMemory]:
    """Symmetric memory for one launch; a rank that does not come is a PeerError."""
    memory = symmetric_memory(x, group, num_bytes)
    try:
        yield memory
    except TimeoutError as error:
        raise PeerError(f"group '{group.communicator.name}': {error}") from error


def _supports(x: Tensor, group: Group, op: str = "sum", **_: object) -> str | None:
    if op != "sum":
        return f"the kernels add, and take no {op}"
    return peers_reason(x, group)


@backend.register("all_reduce", "triton", supports=_supports)
def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """The sum over ranks, written into contiguous ``x``."""
    from pyparallel.kernels.collective.collectives import all_reduce_out

    if x.numel() == 0:
        return x
    with peers(x, group, x.numel() * x.itemsize) as memory:
        return all_reduce_out(x, x, memory)


@backend.register("all_gather", "triton", supports=_supports)
def all_gather(flat: Tensor, group: Group, *, counts: Sequence[int]) -> Tensor:
    """The ranks' flat parts, of these lengths, one after another."""
    from pyparallel.kernels.collective.collectives import all_gather as run

    with peers(flat, group, sum(counts) * flat.itemsize) as memory:
        return run(flat, memory, counts=counts)


@backend.register("reduce_scatter", "triton", supports=_supports)
def reduce_scatter(flat: Tensor, group: Group, op: str = "sum", *, counts: Sequence[int]) -> Tensor:
    """This rank's part, of these lengths, of the sum of flat tensors."""
    from pyparallel.kernels.collective.collectives import reduce_scatter as run

    with peers(flat, group, flat.numel() * flat.itemsize) as memory:
        return run(flat, memory, counts=counts)
