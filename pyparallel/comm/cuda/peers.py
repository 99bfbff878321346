"""GPUs of one machine through each other's memory: small messages by one kernel, large copies by DMA.

The algorithms are those of csrc/core; here is who owns the memory. Segments are shared through CUDA
IPC. Calls of one object must be ordered: on one stream, or by events; they may be captured into graphs.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyparallel.comm.peer_watch import roll_call
from pyparallel.native.cuda import extension as cuda_extension
from pyparallel.native.cuda.extension import NCCL_TYPES
from pyparallel.native.cuda.tuning import tuning

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of one thread block; the segment holds 4 of them for each of 32 blocks: 32 MiB.
SLOT_BYTES = 256 * 1024
MOST_RANKS = 16
GRANULE = 2 << 20
CLOSE_S = 10.0


class PeerMatrix:
    """`overlap.actions.Shared`: a matrix of every rank, at the same place in its buffer."""

    def __init__(
        self, group: Any, addresses: list[int], rank: int, shape: tuple[int, int], like: Tensor
    ) -> None:
        self.group, self.addresses, self.row_bytes = group, addresses, shape[1] * like.itemsize
        memory = cuda_extension.tensor_at(addresses[rank], max(prod(shape) * like.itemsize, 1))
        self.own = memory[: prod(shape) * like.itemsize].view(like.dtype).view(shape)

    def pull(self, peer: int, begin: int, out: Tensor) -> None:
        """Rows begin .. of the peer's matrix into out, by a copy engine, on the current stream."""
        source = self.addresses[peer] + begin * self.row_bytes
        num_bytes = out.shape[0] * self.row_bytes
        self.group.copy(out.data_ptr(), source, num_bytes, cuda_extension.stream())


class PeerMemory:
    """One rank's place among GPUs that load from and store to each other's memory."""

    def __init__(
        self, store: dist.Store, rank: int, size: int, name: str, *, timeout_s: float
    ) -> None:
        """Shares segments through torch's store; a call of all ranks, each on its own device.

        Raises RuntimeError where a peer's memory cannot be opened.
        """
        self.extension = cuda_extension.load()
        self.store, self.rank, self.size = store, rank, size
        # Every segment made, in order: a graph may have captured the address of an outgrown one.
        self.segments: list[Any] = []
        self.buffers: dict[str, tuple[int, list[int]]] = {}
        group = self.extension.PeerGroup
        bases = self._segment(group.segment_bytes(size, SLOT_BYTES))
        self.group = group(name, rank, SLOT_BYTES, timeout_s, bases)
        reduction = self.extension.Reduction
        self.reductions = {op: getattr(reduction, op) for op in ("sum", "max", "min")}

    def _segment(self, num_bytes: int) -> list[int]:
        """Where all ranks' new segments lie in this process; a call of all ranks."""
        segment, number = self.extension.IpcSegments(num_bytes), len(self.segments)
        self.segments.append(segment)
        self.store.set(f"segment/{number}/{self.rank}", segment.handle())
        handles = [self.store.get(f"segment/{number}/{r}") for r in range(self.size)]
        return segment.open(self.rank, handles)

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
    def reason_against_sum(dtype: torch.dtype, num_bytes: int) -> str | None:
        """Why `all_reduce` cannot, or should not, take that many bytes of a dtype, or None."""
        if dtype not in DTYPES:
            return f"{dtype} is not summed over peer memory"
        most = tuning()["peer_all_reduce_bytes"]
        return f"{num_bytes} bytes are more than {most}" if num_bytes > most else None

    def algorithm(self, num_bytes: int) -> Any:
        """One step that reads everything, or two that read 1/R each: a function of the bytes alone."""
        algorithms = self.extension.Algorithm
        one_shot = num_bytes * (self.size - 1) <= tuning()["one_shot_read_bytes"]
        return algorithms.one_shot if one_shot else algorithms.two_shot

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        """In place, on the current stream; one step or two by size."""
        how = self.reductions[op], self.algorithm(tensor.numel() * tensor.itemsize)
        arguments = (tensor.data_ptr(), tensor.numel(), NCCL_TYPES[tensor.dtype], *how)
        self.group.all_reduce(*arguments, cuda_extension.stream())

    @staticmethod
    def reason_against_norm(x: Tensor, residual: Tensor, weight: Tensor) -> str | None:
        """Why `all_reduce_residual_rms_norm` cannot, or should not, take these [..., H], or None."""
        if x.dtype not in DTYPES or residual.dtype != x.dtype or weight.dtype != x.dtype:
            return f"dtypes {x.dtype}, {residual.dtype} and {weight.dtype} are not one float type"
        if x.shape != residual.shape or weight.shape != x.shape[-1:]:
            return (
                f"shapes {list(x.shape)}, {list(residual.shape)} and {list(weight.shape)} are not "
                "[..., H] twice and [H]"
            )
        if x.shape[-1] * x.itemsize > SLOT_BYTES:
            return f"a row of {x.shape[-1]} does not fit a slot of {SLOT_BYTES} bytes"
        num_bytes, most = x.numel() * x.itemsize, tuning()["peer_norm_bytes"]
        return f"{num_bytes} bytes are more than {most}" if num_bytes > most else None

    def all_reduce_residual_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(y, h): h = sum over ranks of x + residual, y = h / rms(h) * weight; x, residual [M, H].

        One kernel; the bits are those of an all-reduce, an addition and a norm.
        """
        if x.dim() != 2 or x.shape != residual.shape or weight.shape != x.shape[1:]:
            raise ValueError(
                f"x: expected [M, H] beside a residual of that shape and a weight [H], got "
                f"{list(x.shape)}, {list(residual.shape)}, {list(weight.shape)}; reshape them"
            )
        tensors = (x, residual, weight)
        if any(t.dtype != x.dtype or not t.is_contiguous() for t in tensors):
            raise ValueError(
                "x, residual, weight: expected contiguous tensors of one dtype, got "
                f"{[(str(t.dtype), t.stride()) for t in tensors]}; call .contiguous() or .to()"
            )
        h, y = torch.empty_like(x), torch.empty_like(x)
        addresses = [t.data_ptr() for t in (*tensors, h, y)]
        how = self.algorithm(x.numel() * x.itemsize)
        numbers = (*x.shape, eps, NCCL_TYPES[x.dtype], how)
        self.group.all_reduce_norm(*addresses, *numbers, cuda_extension.stream())
        return y, h

    def share(self, name: str, rows: int, columns: int, like: Tensor) -> PeerMatrix:
        """A matrix [rows, columns] of every rank, in the same memory at every call of that name.

        A call of all ranks with the same arguments; more than before makes new segments, which a
        captured graph cannot: ValueError.
        """
        num_bytes = max(rows * columns * like.itemsize, 1)
        held, addresses = self.buffers.get(name, (0, []))
        if held < num_bytes:
            if torch.cuda.is_current_stream_capturing():
                raise ValueError(
                    f"{name}: expected at most {held} bytes of peer memory inside a graph's capture, "
                    f"got {num_bytes}; run the layer once at this size before capturing"
                )
            size = -(-max(num_bytes, 2 * held) // GRANULE) * GRANULE
            addresses = self._segment(size)
            self.buffers[name] = (size, addresses)
        return PeerMatrix(self.group, addresses, self.rank, (rows, columns), like)

    def meet(self) -> None:
        """A barrier of the ranks' current streams: one warp, bounded, its faults told by `check`."""
        self.group.barrier(cuda_extension.stream())

    def check(self) -> None:
        """Raises PeerError if a kernel that has run found a peer missing or in another call."""
        self.group.check()

    def close(self, *, wait: bool = True) -> None:
        """Closes the peers' segments, and frees the own ones when the peers have closed those.

        wait: not where a peer is lost; a peer that does not answer is given up after `CLOSE_S`.
        """
        for segment in self.segments:
            segment.close()
        if wait and self.segments:
            roll_call(self.store, self.rank, self.size, what="closed", seconds=CLOSE_S)
        self.segments.clear()
        self.buffers.clear()
