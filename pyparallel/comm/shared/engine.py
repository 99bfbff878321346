"""The engine of CPU ranks on one machine: collectives over shared memory.

What runs is in ``csrc/core`` (the algorithms) and ``csrc/cpu`` (the memory, the waiting, the SIMD);
this file checks tensors and hands addresses over. How ranks find each other is in ``rendezvous.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from pyparallel import _C
from pyparallel._C import SharedMemoryGroup, fast_collectives, slot_bytes
from pyparallel.comm.call_order import CallOrder
from pyparallel.comm.communicator import Communicator, Work
from pyparallel.comm.rendezvous import meet
from pyparallel.comm.shared.buffer import SharedBuffer
from pyparallel.comm.shared.host_tensors import (
    check_pair,
    exchange_code,
    reducible_code,
    reduction_code,
)

DEFAULT_TIMEOUT_S = 300.0
# Ranks that join have all arrived already.
JOIN_TIMEOUT_S = 60.0


class SharedMemoryCommunicator(Communicator):
    """Ranks that are processes of one machine, up to 64, talking through anonymous shared memory.

    Tensors are contiguous CPU tensors. Reductions run in rank order in fp32 and round once, so every
    rank and every run gets the same bits. A peer that died or is stuck, or that makes another call
    than this rank, raises :class:`PeerError`; the group then refuses further work with that reason.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        size: int,
        memory_descriptor: int,
        process_descriptors: Sequence[int],
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Take over descriptors that :func:`pyparallel.comm.rendezvous.meet` made."""
        self.rank, self.size, self.name = rank, size, name
        self.timeout_s = timeout_s
        self.engine = SharedMemoryGroup(
            name, rank, size, memory_descriptor, list(process_descriptors), timeout_s
        )
        # True if done, False if the arguments are not plain; see csrc/bindings/collectives_fast.cpp.
        fast = fast_collectives(self.engine)
        self._fast_all_reduce: Callable[..., bool] = fast["all_reduce"]
        self._fast_all_gather: Callable[..., bool] = fast["all_gather"]
        self._fast_reduce_scatter: Callable[..., bool] = fast["reduce_scatter"]
        self._order = CallOrder(name)
        # What a rank can show the others at once.
        self.slot_bytes: int = slot_bytes(self.engine)
        self._buffer: SharedBuffer | None = None

    @classmethod
    def create(
        cls, process_group: dist.ProcessGroup, name: str, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> SharedMemoryCommunicator:
        """Join the other ranks of ``process_group``; a call of all of them.

        Args:
            timeout_s: how long one call may wait for a peer that is alive.

        Raises:
            ValueError: more than 64 ranks, or ranks on several machines.
            PeerError: the ranks could not reach one another; the message names rank and reason.
        """
        meeting = meet(process_group, name, timeout_s=min(timeout_s, JOIN_TIMEOUT_S))
        if len(meeting.machines) > 1:
            for descriptor in (meeting.memory, *meeting.processes):
                if descriptor >= 0:
                    os.close(descriptor)
            raise ValueError(
                f"group '{name}': its ranks are on {len(meeting.machines)} machines or containers; "
                "use pyparallel.comm.connect.connect, which spans them"
            )
        return cls(
            name,
            process_group.rank(),
            process_group.size(),
            meeting.memory,
            meeting.processes,
            timeout_s=timeout_s,
        )

    def all_reduce(self, tensor: Tensor, *, op: str = "sum", async_op: bool = False) -> Work | None:
        if not async_op and self._order.idle and self._fast_all_reduce(tensor, op):
            return None
        code = reducible_code(tensor, "tensor")
        arguments = (tensor.data_ptr(), tensor.numel(), code, reduction_code(op))
        return self._call(async_op, self.engine.all_reduce, arguments, tensor)

    def all_gather(
        self,
        output: Tensor,
        input: Tensor,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work | None:
        if not async_op and self._order.idle and self._fast_all_gather(output, input, counts):
            return None
        code = exchange_code(output, "output")
        check_pair(output, input)
        self._check_parts("output", output.numel(), "input", input.numel(), counts)
        arguments = (output.data_ptr(), input.data_ptr(), output.numel(), counts, code)
        return self._call(async_op, self.engine.all_gather, arguments, output, input)

    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor,
        *,
        counts: Sequence[int] | None = None,
        op: str = "sum",
        async_op: bool = False,
    ) -> Work | None:
        if (
            not async_op
            and self._order.idle
            and self._fast_reduce_scatter(output, input, counts, op)
        ):
            return None
        code = reducible_code(output, "output")
        check_pair(output, input)
        self._check_parts("input", input.numel(), "output", output.numel(), counts)
        arguments = (
            output.data_ptr(),
            input.data_ptr(),
            input.numel(),
            counts,
            code,
            reduction_code(op),
        )
        return self._call(async_op, self.engine.reduce_scatter, arguments, output, input)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work | None:
        code = exchange_code(output, "output")
        check_pair(output, input)
        for name, counts, tensor in (
            ("output", output_counts, output),
            ("input", input_counts, input),
        ):
            if counts is not None:
                self._check_counts(f"{name}_counts", counts, tensor.numel())
            elif tensor.numel() % self.size:
                raise ValueError(
                    f"{name}: {tensor.numel()} elements do not divide by {self.size} ranks; "
                    f"give {name}_counts="
                )
        arguments = (
            output.data_ptr(),
            input.data_ptr(),
            output.numel(),
            input.numel(),
            output_counts,
            input_counts,
            code,
        )
        return self._call(async_op, self.engine.all_to_all, arguments, output, input)

    def broadcast(self, tensor: Tensor, src: int, *, async_op: bool = False) -> Work | None:
        code = exchange_code(tensor, "tensor")
        if not 0 <= src < self.size:
            raise ValueError(f"src: expected a rank from 0 to {self.size - 1}, got {src}")
        arguments = (tensor.data_ptr(), tensor.numel(), code, src)
        return self._call(async_op, self.engine.broadcast, arguments, tensor)

    def send(self, tensor: Tensor, dst: int, *, tag: int = 0) -> None:
        code = exchange_code(tensor, "tensor")
        self._order.drain()
        self.engine.send(tensor.data_ptr(), tensor.numel(), code, dst, tag)

    def recv(self, tensor: Tensor, src: int, *, tag: int = 0) -> None:
        code = exchange_code(tensor, "tensor")
        self._order.drain()
        self.engine.receive(tensor.data_ptr(), tensor.numel(), code, src, tag)

    def barrier(self) -> None:
        self._order.drain()
        self.engine.barrier()

    def shared_buffer(self, num_bytes: int) -> SharedBuffer:
        """Memory of every rank that the others read in place, for one fused operation.

        Args:
            num_bytes: what a turn must hold; the same on all ranks. More than before makes a new
                buffer, which is then a call of all ranks.
        """
        self._order.drain()
        if self._buffer is None or self._buffer.num_bytes < num_bytes:
            # Twice what is needed, so that growing lengths don't make a buffer each.
            self._buffer = SharedBuffer(self.engine, self.rank, self.size, 2 * num_bytes)
        return self._buffer

    def region(self, num_bytes: int) -> _C.SharedBuffer:
        """New memory of ``num_bytes`` and more on every rank, zeros; a call of all ranks."""
        self._order.drain()
        return _C.SharedBuffer(self.engine, -(-num_bytes // 2))

    def free_engine(self) -> SharedMemoryGroup:
        """The engine, when no call is under way, for a fused operation's own calls."""
        self._order.drain()
        return self.engine

    def close(self) -> None:
        self._order.close()
        try:
            self.engine.flush()
        finally:
            self.engine.close()

    def _call(
        self, async_op: bool, call: Callable[..., None], arguments: tuple, *keep: Tensor
    ) -> Work | None:
        def made(*_: Tensor) -> None:
            call(*arguments)

        # The tensors go along so that they outlive the call, whatever the caller does with his.
        return self._order.run(async_op, made, *keep)

    def _check_counts(self, name: str, counts: Sequence[int], total: int) -> None:
        if len(counts) != self.size or sum(counts) != total or min(counts) < 0:
            raise ValueError(
                f"{name}: expected {self.size} counts that sum to {total}, got {list(counts)}"
            )

    def _check_parts(
        self,
        whole_name: str,
        whole: int,
        part_name: str,
        part: int,
        counts: Sequence[int] | None,
    ) -> None:
        if counts is not None:
            self._check_counts("counts", counts, whole)
            if part != counts[self.rank]:
                raise ValueError(
                    f"{part_name}: expected counts[{self.rank}] = {counts[self.rank]} elements, "
                    f"got {part}"
                )
        elif part * self.size != whole:
            raise ValueError(
                f"{whole_name}: expected {self.size} x {part_name}'s {part} elements, got {whole}; "
                "give counts= where the parts are uneven"
            )
