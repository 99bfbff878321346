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

from pyparallel.comm.communicator import (
    Communicator,
    PeerError,
    Work,
    check_own,
    rank_ordered_reduce,
    split_counts,
)
from pyparallel.comm.cuda.peers import PeerMemory
from pyparallel.comm.cuda.windows import Windows
from pyparallel.comm.peer_watch import PeerWatch, meet_neighbours, roll_call
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

    def all_reduce(self, tensor: Tensor, *, op: str = "sum", async_op: bool = False) -> Work | None:
        if not self.deterministic:
            return self._enqueue(async_op, self._nccl_all_reduce, tensor, op, uses=(tensor,))
        # Peer kernels are ordered by the caller's stream; those of another stream would not be.
        reason = PeerMemory.reason_against_sum(tensor.dtype, tensor.numel() * tensor.itemsize)
        if self.peers is not None and not async_op and reason is None:
            return self._enqueue(
                False, self.call, self.peers.all_reduce, tensor, op, uses=(tensor,)
            )
        flat = tensor.view(-1)
        base, extra = divmod(flat.numel(), self.size)
        counts = [base + (rank < extra) for rank in range(self.size)]

        def run() -> None:
            mine = flat.new_empty(counts[self.rank])
            self._reduce_scatter(mine, flat, counts, op)
            self._all_gather(flat, mine, counts)

        return self._enqueue(async_op, run, uses=(tensor,))

    def all_gather(
        self,
        output: Tensor,
        input: Tensor,
        *,
        counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work | None:
        parts = split_counts(output.numel(), self.size, counts, "all_gather")
        check_own("all_gather", input, parts[self.rank])
        return self._enqueue(async_op, self._all_gather, output, input, parts, uses=(output, input))

    def reduce_scatter(
        self,
        output: Tensor,
        input: Tensor,
        *,
        counts: Sequence[int] | None = None,
        op: str = "sum",
        async_op: bool = False,
    ) -> Work | None:
        parts = split_counts(input.numel(), self.size, counts, "reduce_scatter")
        check_own("reduce_scatter", output, parts[self.rank])
        return self._enqueue(
            async_op, self._reduce_scatter, output, input, parts, op, uses=(output, input)
        )

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_counts: Sequence[int] | None = None,
        input_counts: Sequence[int] | None = None,
        async_op: bool = False,
    ) -> Work | None:
        into = split_counts(output.numel(), self.size, output_counts, "all_to_all output")
        out = split_counts(input.numel(), self.size, input_counts, "all_to_all input")
        return self._enqueue(
            async_op, self._all_to_all, output, input, into, out, uses=(output, input)
        )

    def broadcast(self, tensor: Tensor, src: int, *, async_op: bool = False) -> Work | None:
        def run() -> None:
            count = tensor.numel() * tensor.element_size()
            self.call(self.engine.broadcast, tensor.data_ptr(), count, BYTES, src, _stream())

        return self._enqueue(async_op, run, uses=(tensor,))

    def send(self, tensor: Tensor, dst: int, *, tag: int = 0) -> None:
        self._exchange([(tensor, dst)], [], "send")

    def recv(self, tensor: Tensor, src: int, *, tag: int = 0) -> None:
        self._exchange([], [(tensor, src)], "recv")

    def exchange(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int) -> None:
        """Sends one tensor and receives another as one group, on the current stream."""
        self._exchange([(send, send_to)], [(receive, receive_from)], "exchange")

    def barrier(self) -> None:
        flag = torch.zeros(self.size, dtype=torch.uint8, device="cuda")
        self._all_gather(flag, flag[self.rank : self.rank + 1], [1] * self.size)
        self.synchronize()

    def synchronize(self) -> None:
        """Waits on the host for the current stream; bounded, raises PeerError like every call."""
        self.call(self.engine.synchronize, _stream())
        if self.peers is not None:
            self.call(self.peers.check)

    def close(self) -> None:
        self._watch.close()
        if self.peers is not None:
            self.peers.close(wait=self._failure is None)
        if self._failure is None:
            self.windows.close()
        self.engine.close()

    def _all_gather(self, output: Tensor, input: Tensor, counts: Sequence[int]) -> None:
        kind, element = type_of(output)
        if len(set(counts)) == 1:
            count = input.numel() * element
            arguments = (output.data_ptr(), input.data_ptr(), count, kind, _stream())
            self.call(self.engine.all_gather, *arguments)
            return
        parts = output.view(-1).split(list(counts))
        sends = [(input, peer) for peer in range(self.size)]
        self._exchange(sends, list(zip(parts, range(self.size), strict=True)), "all_gather")

    def _all_to_all(
        self, output: Tensor, input: Tensor, into: Sequence[int], out: Sequence[int]
    ) -> None:
        receives = zip(output.view(-1).split(list(into)), range(self.size), strict=True)
        sends = zip(input.view(-1).split(list(out)), range(self.size), strict=True)
        self._exchange(list(sends), list(receives), "all_to_all")

    def _reduce_scatter(
        self, output: Tensor, input: Tensor, counts: Sequence[int], op: str
    ) -> None:
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

    def _enqueue(
        self, async_op: bool, run: Callable[..., None], *args: Any, uses: Sequence[Tensor]
    ) -> Work | None:
        for tensor in uses:
            if not tensor.is_cuda or not tensor.is_contiguous():
                raise ValueError("tensor: expected a contiguous CUDA tensor; call .contiguous()")
        if not async_op:
            run(*args)
            return None
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run(*args)
            done = self.stream.record_event()
        for tensor in uses:
            # The allocator must not hand the memory out again while the other stream uses it.
            tensor.record_stream(self.stream)
        return Work(lambda: torch.cuda.current_stream().wait_event(done))

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
