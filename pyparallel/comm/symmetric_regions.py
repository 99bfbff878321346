"""Memory of all ranks of a group that Triton kernels reach through a table of addresses.

CPU ranks: the engine's shared memory. GPU ranks: torch's symmetric memory, over NVLink or PCIe. Regions
are made at the first call that needs them, and made anew, twice as large, where a call does not fit;
that is then a call of all ranks, so sizes must be such as all ranks know alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from pyparallel.comm.communicator import Communicator
from pyparallel.comm.group import Group
from pyparallel.comm.shared.engine import DEFAULT_TIMEOUT_S, SharedMemoryCommunicator

if TYPE_CHECKING:
    from pyparallel.kernels.collective.symmetric import SymmetricMemory

FIRST_BYTES = 1 << 20

# What keeps a region mapped, and the kernels' view of it.
_regions: WeakKeyDictionary[Communicator, tuple[Any, SymmetricMemory]] = WeakKeyDictionary()


def reason_against(x: Tensor, group: Group) -> str | None:
    """Why the ranks of ``group`` can't reach each other's memory for tensors where ``x`` is."""
    communicator = group.communicator
    if x.is_cuda:
        if communicator.process_group is None:
            return f"the group '{communicator.name}' has no process group to share GPU memory in"
        return None
    if not isinstance(communicator, SharedMemoryCommunicator):
        return f"the group '{communicator.name}' does not share memory"
    return None


def symmetric_memory(x: Tensor, group: Group, num_bytes: int) -> SymmetricMemory:
    """Regions that hold ``num_bytes`` a call, for kernels on the device of ``x``."""
    held = _regions.get(group.communicator)
    if held is None or held[1].capacity < num_bytes:
        make = _gpu_region if x.is_cuda else _host_region
        held = make(x, group.communicator, max(2 * num_bytes, FIRST_BYTES))
        _regions[group.communicator] = held
    return held[1]


def _host_region(
    x: Tensor, communicator: SharedMemoryCommunicator, capacity: int
) -> tuple[Any, SymmetricMemory]:
    from pyparallel.kernels.collective.symmetric import FLAG_BYTES, SymmetricMemory

    # A buffer's two halves lie one after another: here they are one region.
    buffer = communicator.region(FLAG_BYTES + 2 * capacity)
    addresses = [
        torch.frombuffer(buffer.memory(rank, 0), dtype=torch.uint8).data_ptr()
        for rank in range(communicator.size)
    ]
    memory = SymmetricMemory(
        communicator.rank, addresses, 2 * buffer.bytes, timeout_s=communicator.timeout_s
    )
    return buffer, memory


def _gpu_region(
    x: Tensor, communicator: Communicator, capacity: int
) -> tuple[Any, SymmetricMemory]:
    import torch.distributed._symmetric_memory as symm_mem

    from pyparallel.kernels.collective.symmetric import FLAG_BYTES, SymmetricMemory

    num_bytes = FLAG_BYTES + 2 * capacity
    # Kernels under way may still read the region that this one takes the place of.
    torch.cuda.synchronize(x.device)
    region = symm_mem.empty(num_bytes, dtype=torch.uint8, device=x.device)
    region.zero_()
    handle = symm_mem.rendezvous(region, communicator.process_group)
    torch.cuda.synchronize(x.device)
    dist.barrier(communicator.process_group)
    memory = SymmetricMemory(
        handle.rank,
        list(handle.buffer_ptrs),
        num_bytes,
        device=x.device,
        timeout_s=getattr(communicator, "timeout_s", DEFAULT_TIMEOUT_S),
    )
    return (region, handle), memory
