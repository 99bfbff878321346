"""Small messages between GPUs of one machine, through each other's memory: one kernel, no library.

The algorithms are those of csrc/core; here is who owns the memory. Segments are shared through CUDA
IPC. Calls of one object must be ordered: on one stream, or by events; they may be captured into graphs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pyparallel import cuda_extension
from pyparallel.cuda_extension import NCCL_TYPES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of one thread block; the segment holds 4 of them for each of 32 blocks: 32 MiB.
SLOT_BYTES = 256 * 1024
# Above this NCCL's copy engines and NVLS win over loads and stores; declared, to be measured.
LARGEST_BYTES = 8 << 20
MOST_RANKS = 16


class PeerMemory:
    """One rank's place among GPUs that load from and store to each other's memory."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, name: str, *, timeout_s: float
    ) -> None:
        """Shares segments through torch's store; a call of all ranks, each on its own device.

        Raises RuntimeError where a peer's memory cannot be opened.
        """
        extension = cuda_extension.load()
        group = extension.PeerGroup
        self.segments = extension.IpcSegments(group.segment_bytes(size, SLOT_BYTES))
        store.set(f"segment/{rank}", self.segments.handle())
        handles = [store.get(f"segment/{r}") for r in range(size)]
        self.group = group(name, rank, SLOT_BYTES, timeout_s, self.segments.open(rank, handles))
        self.reductions = {op: getattr(extension.Reduction, op) for op in ("sum", "max", "min")}
        self.by_size = extension.Algorithm.by_size

    @staticmethod
    def reason_against(processes: dict[int, int], size: int) -> str | None:
        """Why a group cannot use peer memory, or None. processes: its ranks on this machine."""
        if size > MOST_RANKS:
            return f"{size} ranks are more than {MOST_RANKS}"
        if len(processes) != size - 1:
            return "its ranks are on several machines"
        mine = torch.cuda.current_device()
        others = [d for d in range(torch.cuda.device_count()) if d != mine]
        blocked = [d for d in others if not torch.cuda.can_device_access_peer(mine, d)]
        return f"device {mine} cannot access devices {blocked}" if blocked else None

    @staticmethod
    def takes(tensor: Tensor) -> bool:
        """Whether a tensor is small enough, and of a type that is summed here."""
        bytes_ = tensor.numel() * tensor.element_size()
        return tensor.dtype in DTYPES and bytes_ <= LARGEST_BYTES

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        """In place, on the current stream; one step or two by size."""
        kind, stream = NCCL_TYPES[tensor.dtype], torch.cuda.current_stream().cuda_stream
        arguments = (tensor.data_ptr(), tensor.numel(), kind, self.reductions[op], self.by_size)
        self.group.all_reduce(*arguments, stream)

    def all_reduce_residual_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(y, h): h = sum over ranks of x + residual, y = h / rms(h) * weight; x, residual [M, H].

        One kernel; the bits are those of an all-reduce, an addition and a norm.
        """
        if x.dim() != 2 or x.shape != residual.shape or weight.shape != x.shape[1:]:
            raise ValueError(
                f"x: expected [M, H] beside a residual of that shape and a weight [H], got "
                f"{list(x.shape)}, {list(residual.shape)}, {list(weight.shape)}"
            )
        tensors = (x, residual, weight)
        if any(t.dtype != x.dtype or not t.is_contiguous() or not t.is_cuda for t in tensors):
            raise ValueError("x, residual, weight: expected contiguous CUDA tensors of one dtype")
        h, y = torch.empty_like(x), torch.empty_like(x)
        addresses = [t.data_ptr() for t in (*tensors, h, y)]
        numbers = (*x.shape, eps, NCCL_TYPES[x.dtype], self.by_size)
        self.group.all_reduce_norm(*addresses, *numbers, torch.cuda.current_stream().cuda_stream)
        return y, h

    def check(self) -> None:
        """Raises PeerError if a kernel that has run found a peer missing or in another call."""
        self.group.check()
