"""The engine of GPU ranks: NCCL, with rank-ordered sums, bounded waits, and peers that are watched.

Bytes travel by NCCL; sums are done by our own kernel in rank order, in fp32, rounded once, so that every
rank and every run gets the bits of the other engines (NCCL's ring sums in an order that depends on
topology; `deterministic=False` takes it where speed matters more). All calls are enqueued on the
current stream and return at once; with `async_op=True` they run on the communicator's own stream, of
high priority, and `Work.wait()` orders the current stream behind them. Safe under CUDA graph capture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyparallel.comm.checks import Takes
from pyparallel.comm.communicator import Communicator, PeerError, Work
from pyparallel.comm.cuda.peers import PeerMemory
from pyparallel.comm.cuda.windows import Windows
from pyparallel.comm.peer_watch import PeerWatch, meet_neighbours, roll_call
from pyparallel.comm.rank_order import rank_ordered_reduce
from pyparallel.cut.shares import part_sizes
from pyparallel.native.cuda import extension as cuda_extension
from pyparallel.native.cuda.extension import BYTES, NCCL_REDUCTIONS, NCCL_TYPES, type_of
from pyparallel.native.cuda.extension import stream as _stream

DEFAULT_TIMEOUT_S = 300.0


class NcclCommunicator(Communicator):
    """Ranks with a GPU each, on any number of machines.

    A rank that dies, is stuck, or whose link fails raises `PeerError` on all others, naming the
    operation, its sequence number, the group and the ranks that are missing; the group then refuses
    further work with the same reason.
    """

    takes = Takes("cuda")

    def __init__(
        self,
        name: str,
        engine: Any,
        *,
        store: dist.Store,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        deterministic: bool = True,
    ) -> None:
        """Wraps an engine of the extension; `create` and `split` make them."""
        self.name, self.engine, self.store = name, engine, store
        self.rank, self.size = engine.rank, engine.size
        self.timeout_s, self.deterministic = timeout_s, deterministic
        self.stream = torch.cuda.ExternalStream(engine.stream)
        self.windows = Windows(engine)
        self._failure: PeerError | None = None
        processes = meet_neighbours(store, self.rank, self.size)
        self.peers: PeerMemory | None = None
        if PeerMemory.reason_against(processes, self.size) is None:
            self.peers = PeerMemory(store, self.rank, self.size, name, timeout_s=timeout_s)
        self._watch = PeerWatch(processes, self._lost, tick=self._tick)

    @classmethod
    def create(
        cls,
        store: dist.Store,
        rank: int,
        size: int,
        name: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        deterministic: bool = True,
    ) -> NcclCommunicator:
        """Joins the other ranks, each on its own device; PeerError if not all come in time."""
        extension = cuda_extension.load()
        keys = dist.PrefixStore(f"pyparallel/nccl/{name}", store)
        if rank == 0:
            keys.set("id", extension.NcclCommunicator.unique_id())
        unique = keys.get("id")
        engine = extension.NcclCommunicator(name, unique, rank, size, timeout_s)
        return cls(name, engine, store=keys, timeout_s=timeout_s, deterministic=deterministic)

    def split(self, color: int, key: int, name: str) -> NcclCommunicator | None:
        """The sub-group of all ranks with the same color >= 0; None with a color below 0."""
        if (engine := self.call(self.engine.split, color, key, name)) is None:
            return None
        return NcclCommunicator(
            name,
            engine,
            store=dist.PrefixStore(f"{name}/{color}", self.store),
            timeout_s=self.timeout_s,
            deterministic=self.deterministic,
        )

    def _issue(self, async_op: bool, call: Callable[..., None], *arguments: Any) -> Work | None:
        if not async_op:
            call(*arguments)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            call(*arguments)
            done = self.stream.record_event()
        for argument in arguments:
            if isinstance(argument, Tensor):
                # The allocator must not hand the memory out again while the other stream uses it.
                argument.record_stream(self.stream)
        return Work(lambda: torch.cuda.current_stream().wait_event(done))

    def _all_reduce(self, tensor: Tensor, op: str) -> None:
        if not self.deterministic:
            self._nccl_all_reduce(tensor, op)
        elif self._reaches_peers(tensor):
            self.call(self.peers.all_reduce, tensor, op)
        else:
            flat = tensor.view(-1)
            counts = part_sizes(flat.numel(), self.size)
            mine = flat.new_empty(counts[self.rank])
            self._reduce_scatter(mine, flat, counts, op)
            self._all_gather(flat, mine, counts)

    def _reaches_peers(self, tensor: Tensor) -> bool:
        """Whether our kernel over the peers' memory sums ``tensor``."""
        if self.peers is None:
            return False
        if (
            PeerMemory.reason_against_sum(tensor.dtype, tensor.numel() * tensor.itemsize)
            is not None
        ):
            return False
        # Peer kernels are ordered by the caller's stream; on ours, where asynchronous calls run, they
        # would not be.
        return _stream() != self.engine.stream

    def exchange(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int) -> None:
        """Sends one tensor and receives another as one group, on the current stream."""
        self._exchange([(send, send_to)], [(receive, receive_from)], "exchange")

    def synchronize(self) -> None:
        """Waits on the host for the current stream; bounded, raises PeerError like every call."""
        self.call(self.engine.synchronize, _stream())
        if self.peers is not None:
            self.call(self.peers.check)

    def _all_gather(self, output: Tensor, input: Tensor, counts: list[int]) -> None:
        kind, element = type_of(output)
        if len(set(counts)) == 1:
            count = input.numel() * element
            arguments = (output.data_ptr(), input.data_ptr(), count, kind, _stream())
            self.call(self.engine.all_gather, *arguments)
            return
        parts = output.view(-1).split(counts)
        sends = [(input, peer) for peer in range(self.size)]
        self._exchange(sends, list(zip(parts, range(self.size), strict=True)), "all_gather")

    def _all_to_all(
        self, output: Tensor, input: Tensor, received: list[int], sent: list[int]
    ) -> None:
        receives = zip(output.view(-1).split(received), range(self.size), strict=True)
        sends = zip(input.view(-1).split(sent), range(self.size), strict=True)
        self._exchange(list(sends), list(receives), "all_to_all")

    def _reduce_scatter(self, output: Tensor, input: Tensor, counts: list[int], op: str) -> None:
        if not self.deterministic and len(set(counts)) == 1 and input.dtype in NCCL_TYPES:
            where = (output.data_ptr(), input.data_ptr(), output.numel())
            how = (NCCL_TYPES[input.dtype], NCCL_REDUCTIONS[op], _stream())
            self.call(self.engine.reduce_scatter, *where, *how)
            return
        parts = input.new_empty(self.size, output.numel())
        self._all_to_all(parts, input, [output.numel()] * self.size, counts)
        if op == "sum" and output.dtype in (torch.float32, torch.float16, torch.bfloat16):
            from pyparallel.native.cuda.ops import rank_sum

            rank_sum(parts.view(self.size, 1, -1), output.view(1, -1))
        else:
            rank_ordered_reduce(parts.unbind(), op, output)

    def _nccl_all_reduce(self, tensor: Tensor, op: str) -> None:
        if tensor.dtype not in NCCL_TYPES:
            raise ValueError(f"all_reduce: NCCL sums no {tensor.dtype}; use deterministic=True")
        address, kinds = tensor.data_ptr(), (NCCL_TYPES[tensor.dtype], NCCL_REDUCTIONS[op])
        self.call(self.engine.all_reduce, address, address, tensor.numel(), *kinds, _stream())

    def _broadcast(self, tensor: Tensor, src: int) -> None:
        count = tensor.numel() * tensor.element_size()
        self.call(self.engine.broadcast, tensor.data_ptr(), count, BYTES, src, _stream())

    def _send(self, tensor: Tensor, dst: int, tag: int) -> None:
        self._exchange([(tensor, dst)], [], "send")

    def _recv(self, tensor: Tensor, src: int, tag: int) -> None:
        self._exchange([], [(tensor, src)], "recv")

    def _barrier(self) -> None:
        flag = torch.zeros(self.size, dtype=torch.uint8, device="cuda")
        self._all_gather(flag, flag[self.rank : self.rank + 1], [1] * self.size)
        self.synchronize()

    def _close(self) -> None:
        self._watch.close()
        if self.peers is not None:
            self.peers.close(wait=self._failure is None)
        if self._failure is None:
            self.windows.close()
        self.engine.close()

    def _exchange(
        self,
        sends: Sequence[tuple[Tensor, int]],
        receives: Sequence[tuple[Tensor, int]],
        operation: str,
    ) -> None:
        out, into = (
            [(t.data_ptr(), t.numel() * t.itemsize, peer) for t, peer in pairs]
            for pairs in (sends, receives)
        )
        self.call(self.engine.exchange, out, into, BYTES, _stream(), operation)

    def call(self, call: Callable[..., Any], *args: Any) -> Any:
        """call(*args); a PeerError names the missing ranks, and is that of every later call."""
        if self._failure is not None:
            raise self._failure
        try:
            return call(*args)
        except PeerError as error:
            raise self._with_missing(error) from None

    def _with_missing(self, error: PeerError) -> PeerError:
        """Names the missing ranks: those that do not answer a roll call over the store."""
        known = tuple(getattr(error, "missing", ()))
        missing = known or roll_call(self.store, self.rank, self.size)
        named = PeerError(f"{error}; missing: {', '.join(map(str, missing)) or 'none'}")
        for field in ("operation", "sequence", "group"):
            setattr(named, field, getattr(error, field, None))
        named.missing = missing
        self._failure = named
        return named

    def _lost(self, ranks: list[int]) -> None:
        self.engine.fail(f"died: rank {', '.join(map(str, ranks))}", ranks)
        if self.peers is not None:
            self.peers.group.fail(ranks)

    def _tick(self) -> bool:
        try:
            self.engine.poll()
        except PeerError:
            # The thread that uses the group hears of it at its next call.
            return False
        return True
