"""When kernels that communicate run, and the memory that they do it through.

They are for fp32, fp16 and bf16 over ranks that reach each other's memory
(:mod:`pyparallel.comm.symmetric_regions`), where ``triton`` is asked for by name. Everything else (other
dtypes, maxima, groups over machines) they refuse, and it stays with the group's own engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.comm.communicator import PeerError
from pyparallel.comm.group import Group
from pyparallel.comm.symmetric_regions import reason_against as region_reason
from pyparallel.comm.symmetric_regions import symmetric_memory
from pyparallel.kernels.collective.symmetric import SymmetricMemory
from pyparallel.ops.triton import dtype_reason


def sum_reason(x: Tensor, group: Group, op: str = "sum", **_: Any) -> str | None:
    """Why a collective can't run here, or None."""
    if op != "sum":
        return f"the kernels add, and take no {op}"
    return peers_reason(x, group)


def peers_reason(x: Tensor, group: Group) -> str | None:
    """Why the kernels that communicate can't run, or None."""
    if backend.chosen() != "triton":
        return "kernels that communicate run only where triton is asked for"
    if group.size == 1:
        return "the group has one rank"
    if torch.compiler.is_compiling():
        return "not part of a compiled graph"
    return dtype_reason(x) or region_reason(x, group)


@contextmanager
def peers(x: Tensor, group: Group, num_bytes: int) -> Iterator[SymmetricMemory]:
    """Symmetric memory for one launch; a rank that does not come is a PeerError."""
    memory = symmetric_memory(x, group, num_bytes)
    try:
        yield memory
    except TimeoutError as error:
        raise PeerError(f"group '{group.communicator.name}': {error}") from error
