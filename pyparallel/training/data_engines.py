"""This library's collectives in the places that torch's DDP and FSDP2 have for them."""

# No postponed annotations: DDP compares its hook's with types.
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from pyparallel.comm.collectives import all_reduce_raw, record_collective
from pyparallel.comm.group import Group

# As much as DDP sums at once.
BUCKET_BYTES = 25 << 20


class BucketSums:
    """The sums over a group that go on while backward does; ``divisor``: what they are divided by."""

    def __init__(self, group: Group, divisor: int = 1) -> None:
        self.group = group
        self.divisor = divisor
        self._waiter: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None

    def start(self, buffer: Tensor) -> Future[Tensor]:
        """Begin to sum ``buffer`` over the ranks, in place."""
        if buffer.is_cuda:
            return self._on_stream(buffer)
        if self._waiter is None:
            self._waiter = ThreadPoolExecutor(1, "pyparallel-gradients")
        future: Future[Tensor] = Future()
        pending = all_reduce_raw(buffer, self.group, async_op=True)

        def wait() -> None:
            try:
                future.set_result(self._divided(pending.wait()))
            except Exception as error:
                future.set_exception(error)

        self._waiter.submit(wait)
        return future

    def _on_stream(self, buffer: Tensor) -> Future[Tensor]:
        """On a GPU nobody waits: the future carries the stream that the sum is enqueued on."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(buffer.device)
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        future: Future[Tensor] = Future(devices=[buffer.device])
        with torch.cuda.stream(self._stream):
            future.set_result(self._divided(all_reduce_raw(buffer, self.group)))
        return future

    def _divided(self, total: Tensor) -> Tensor:
        return total if self.divisor == 1 else total.div_(self.divisor)


def sum_bucket(sums: BucketSums, bucket: dist.GradBucket) -> Future[Tensor]:
    """DDP's communication hook: it hands the buckets over in one order on all ranks, and waits for their
    sums at the end of backward."""
    return sums.start(bucket.buffer())


def sum_behind_backward(parameters: Iterable[nn.Parameter], group: Group) -> None:
    """The same sums, but behind backward: for gradients that DDP's hooks do not see."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    while gradients:
        bucket, size = [], 0
        while gradients and size < BUCKET_BYTES:
            if bucket and gradients[0].dtype != bucket[0].dtype:
                break
            bucket.append(gradients.pop(0))
            size += bucket[-1].nbytes
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        whole = all_reduce_raw(flat, group)
        sizes = [gradient.numel() for gradient in bucket]
        for gradient, part in zip(bucket, whole.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))


class _Collective:
    """What FSDP2 asks of a custom collective beside the call: its flat buffers."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class GroupAllGather(_Collective):
    """FSDP2's gathering of a layer's parameters."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        record_collective("all_gather", output_tensor.numel() * output_tensor.itemsize)
        self.group.communicator.all_gather(output_tensor, input_tensor)


class GroupReduceScatter(_Collective):
    """FSDP2's sum of a layer's gradients, of which each rank keeps its part."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        if op != dist.ReduceOp.SUM:
            raise ValueError(
                f"op: expected a sum of gradients, got {op}; leave FSDP's factors alone"
            )
        record_collective("reduce_scatter", input_tensor.numel() * input_tensor.itemsize)
        self.group.communicator.reduce_scatter(output_tensor, input_tensor)
