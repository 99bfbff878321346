"""Which engine a group of GPU ranks talks through."""

from __future__ import annotations

import torch.distributed as dist

from pyparallel.comm.communicator import Communicator
from pyparallel.comm.cuda.engine import DEFAULT_TIMEOUT_S, NcclCommunicator
from pyparallel.comm.torch_engine import TorchCommunicator
from pyparallel.native.cuda import extension as cuda_extension


def connect_gpus(
    process_group: dist.ProcessGroup, name: str, *, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Communicator:
    """The communicator of ``process_group`` for CUDA tensors; a call of all its ranks.

    Our own over NCCL where every rank has the CUDA extension, else torch.distributed's; which one, and
    why, `pyparallel doctor` says.

    Raises:
        PeerError: not all ranks came within the timeout.
    """
    ranks = dist.get_process_group_ranks(process_group)
    rank, size = process_group.rank(), process_group.size()
    # Axes have names of their own, groups of one axis have ranks of their own.
    prefix = f"pyparallel/gpus/{name}/{'-'.join(map(str, ranks))}"
    store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
    store.set(f"lacks/{rank}", "; ".join(cuda_extension.missing()))
    if any(store.get(f"lacks/{r}") for r in range(size)):
        return TorchCommunicator(process_group, name)
    return NcclCommunicator.create(store, rank, size, name, timeout_s=timeout_s)
