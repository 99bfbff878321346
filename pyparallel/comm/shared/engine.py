"""The engine of CPU ranks on one machine: collectives over shared memory.

What runs is in ``csrc/core`` (the algorithms) and ``csrc/cpu`` (the memory, the waiting, the SIMD);
this file hands addresses over. How ranks find each other is in ``rendezvous.py``.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pyparallel import _C
from pyparallel._C import SharedMemoryGroup, fast_collectives, slot_bytes
from pyparallel.comm.call_order import CallOrder
from pyparallel.comm.checks import Takes
from pyparallel.comm.communicator import Communicator, Work
from pyparallel.comm.rendezvous import meet
from pyparallel.comm.shared.buffer import SharedBuffer
from pyparallel.comm.shared.host_tensors import CODES, REDUCIBLE_CODES, REDUCTION_CODES

DEFAULT_TIMEOUT_S = 300.0
# Ranks that join have all arrived already.
JOIN_TIMEOUT_S = 60.0


_engines: list[weakref.ref[SharedMemoryGroup]] = []


def end_waits() -> None:
    """Have every wait of this process's engines end with what is missing, as at its timeout."""
    for known in tuple(_engines):
        engine = known()
        if engine is not None:
            engine.timeout_s = 0.0


class SharedMemoryCommunicator(Communicator):
    """Ranks that are processes of one machine, up to 64, talking through anonymous shared memory.

    Tensors are contiguous CPU tensors. Reductions run in rank order in fp32 and round once, so every
    rank and every run gets the same bits. A peer that died or is stuck, or that makes another call
    than this rank, raises :class:`PeerError`; the group then refuses further work with that reason.
    """

    takes = Takes("cpu", moved=CODES, reduced=REDUCIBLE_CODES)

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
        _engines[:] = [known for known in _engines if known() is not None]
        _engines.append(weakref.ref(self.engine))
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

    # Shown to the C++ of csrc/bindings/collectives_fast.cpp first, which looks at the arguments itself.

    def _try_all_reduce(self, tensor: Tensor, op: str) -> bool:
        return self._order.idle and self._fast_all_reduce(tensor, op)

    def _try_all_gather(self, output: Tensor, input: Tensor, counts: Sequence[int] | None) -> bool:
        return self._order.idle and self._fast_all_gather(output, input, counts)

    def _try_reduce_scatter(
        self, output: Tensor, input: Tensor, counts: Sequence[int] | None, op: str
    ) -> bool:
        return self._order.idle and self._fast_reduce_scatter(output, input, counts, op)

    def _issue(self, async_op: bool, call: Callable[..., None], *arguments: Any) -> Work | None:
        # The tensors go along so that they outlive the call, whatever the caller does with his.
        return self._order.run(async_op, call, *arguments)

    def _all_reduce(self, tensor: Tensor, op: str) -> None:
        code = CODES[tensor.dtype]
        self.engine.all_reduce(tensor.data_ptr(), tensor.numel(), code, REDUCTION_CODES[op])

    def _all_gather(self, output: Tensor, input: Tensor, counts: list[int]) -> None:
        out, code = output.data_ptr(), CODES[output.dtype]
        self.engine.all_gather(out, input.data_ptr(), output.numel(), counts, code)

    def _reduce_scatter(self, output: Tensor, input: Tensor, counts: list[int], op: str) -> None:
        out, code, reduction = output.data_ptr(), CODES[output.dtype], REDUCTION_CODES[op]
        self.engine.reduce_scatter(out, input.data_ptr(), input.numel(), counts, code, reduction)

    def _all_to_all(
        self, output: Tensor, input: Tensor, received: list[int], sent: list[int]
    ) -> None:
        out, code = output.data_ptr(), CODES[output.dtype]
        self.engine.all_to_all(
            out, input.data_ptr(), output.numel(), input.numel(), received, sent, code
        )

    def _broadcast(self, tensor: Tensor, src: int) -> None:
        self.engine.broadcast(tensor.data_ptr(), tensor.numel(), CODES[tensor.dtype], src)

    def _send(self, tensor: Tensor, dst: int, tag: int) -> None:
        self.engine.send(tensor.data_ptr(), tensor.numel(), CODES[tensor.dtype], dst, tag)

    def _recv(self, tensor: Tensor, src: int, tag: int) -> None:
        self.engine.receive(tensor.data_ptr(), tensor.numel(), CODES[tensor.dtype], src, tag)

    def _barrier(self) -> None:
        self.engine.barrier()

    def _close(self) -> None:
        self._order.close()
        try:
            self.engine.flush()
        finally:
            self.engine.close()

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
