"""The overlapped linear layers on GPUs: schedules of `pyparallel.overlap` on CUDA streams over NCCL.

Entered into the backend table as `all_gather_linear` and `linear_reduce_scatter` on `cuda`; the plain
functions of `pyparallel.functional` are what they fall to at small M, and what they equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyparallel import backend, cuda_extension
from pyparallel.cuda_communicator import NcclCommunicator
from pyparallel.functional import all_gather_linear as plain_gather
from pyparallel.functional import linear_reduce_scatter as plain_scatter
from pyparallel.functional.linear import bias_grad
from pyparallel.group import Group
from pyparallel.overlap.pipelines import (
    Linear,
    Pipeline,
    Plan,
    all_gather_linear_backward_pipeline,
    all_gather_linear_pipeline,
    linear_reduce_scatter_backward_pipeline,
    linear_reduce_scatter_pipeline,
)
from pyparallel.overlap.predict import LIBRARY_CANDIDATES, PiecesTable
from pyparallel.overlap.schedule import CALLER, COMMUNICATION, COMPUTE

# Which number of pieces; read(path) adds measurements of this machine.
PIECES = PiecesTable(candidates=LIBRARY_CANDIDATES)


class CudaStreams:
    """The streams of one communicator's pipelines: two to compute on, and the communicator's own."""

    def __init__(self, communicator: NcclCommunicator) -> None:
        self.streams = {name: torch.cuda.Stream() for name in COMPUTE}
        self.streams[COMMUNICATION] = communicator.stream

    def run(self, pipeline: Pipeline) -> None:
        """Issues every step in order; the caller's current stream waits for the end of all.

        Nothing blocks the host, and all forks are joined, so the whole may be captured into a graph.
        Temporaries belong to the caller's stream and may be freed as soon as this returns.
        """
        current = torch.cuda.current_stream()
        awaited = pipeline.schedule.awaited()
        ended: dict[str, torch.cuda.Event] = {}
        for step in pipeline.schedule.steps:
            stream = current if step.stream == CALLER else self.streams[step.stream]
            for name in step.waits:
                stream.wait_event(ended[name])
            with torch.cuda.stream(stream):
                pipeline.actions[step.action](step)
            if step.name in awaited:
                ended[step.name] = stream.record_event()


class NcclLink:
    """`overlap.actions.Link` over NCCL, on whatever stream is current."""

    def __init__(self, communicator: NcclCommunicator) -> None:
        self.communicator = communicator

    def exchange(self, send: Tensor, send_to: int, receive: Tensor, receive_from: int) -> None:
        self.communicator.exchange(send, send_to, receive, receive_from)

    def all_gather(self, output: Tensor, own: Tensor, rows: Sequence[int]) -> None:
        counts = [count * own.shape[1] for count in rows]
        self.communicator.all_gather(output, own, counts=counts)

    def all_to_all(self, output: Tensor, rows_out: Sequence[int], send: Tensor) -> None:
        self.communicator.all_to_all(
            output,
            send,
            output_counts=[output[0].numel()] * self.communicator.size,
            input_counts=[count * send.shape[1] for count in rows_out],
        )


_streams: WeakKeyDictionary[NcclCommunicator, CudaStreams] = WeakKeyDictionary()


def streams_of(communicator: NcclCommunicator) -> CudaStreams:
    """The streams of a communicator, made at its first pipeline."""
    if communicator not in _streams:
        _streams[communicator] = CudaStreams(communicator)
    return _streams[communicator]


def reduce_on_gpu(parts: Tensor, out: Tensor) -> None:
    """parts [R, m, N] summed into out [m, N] by the kernel of csrc/cuda/rank_sum.h."""
    from pyparallel.cuda_ops import rank_sum

    if out.numel() > 0:
        rank_sum(parts, out)


def with_bias(bias: Tensor | None) -> Linear:
    """out = rows @ weight^T (+ bias), by cuBLASLt, which adds the bias in its epilogue."""

    def linear(rows: Tensor, weight: Tensor, out: Tensor) -> None:
        if bias is None:
            torch.mm(rows, weight.t(), out=out)
        else:
            torch.addmm(bias, rows, weight.t(), out=out)

    return linear


def _reason_against(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> str | None:
    if not x.is_cuda:
        return "the input is not on a GPU"
    if not isinstance(group.communicator, NcclCommunicator):
        return f"the group '{group.communicator.name}' does not run on our NCCL communicator"
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtypes {x.dtype} and {weight.dtype} are not one float type"
    missing = cuda_extension.missing()
    return missing[0] if missing else None


@backend.register("all_gather_linear", "cuda", supports=_reason_against)
def all_gather_linear(
    x_shard_s: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """y [..., S, N]: the chunks of the gathered input are multiplied as they land. No autograd.

    Args:
        x_shard_s: [..., S_r, K]. weight: [N, K]. bias: [N]. sizes: every rank's S_r.
    """
    lead, width = x_shard_s.shape[:-2], weight.shape[0]
    plan = _plan("all_gather_linear", weight, group, [lead.numel() * size for size in sizes])
    x = x_shard_s.reshape(-1, x_shard_s.shape[-1])
    pipeline = all_gather_linear_pipeline(
        x, weight, plan=plan, link=NcclLink(group.communicator), linear=with_bias(bias)
    )
    streams_of(group.communicator).run(pipeline)
    return _join_tokens(pipeline.results[0], lead, sizes, width)


@backend.register("linear_reduce_scatter", "cuda", supports=_reason_against)
def linear_reduce_scatter(
    x_shard_k: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """y [..., S_r, N]: partial sums travel while the next ones are multiplied. No autograd.

    Args:
        x_shard_k: [..., S, K_r]. weight: [N, K_r]. bias: [N], added once. sizes: every rank's S_r.
    """
    lead, width = x_shard_k.shape[:-2], weight.shape[0]
    plan = _plan("linear_reduce_scatter", weight, group, [lead.numel() * size for size in sizes])
    pipeline = linear_reduce_scatter_pipeline(
        _rank_by_rank(x_shard_k, sizes),
        weight,
        plan=plan,
        link=NcclLink(group.communicator),
        reduce=reduce_on_gpu,
    )
    streams_of(group.communicator).run(pipeline)
    y = pipeline.results[0].view(*lead, sizes[group.rank], width)
    return y if bias is None else y.add_(bias)


def _reason_against_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, ...],
) -> str | None:
    return _reason_against(grad, weight, None, group, sizes)


@backend.register("all_gather_linear_backward", "cuda", supports=_reason_against_backward)
def all_gather_linear_backward(
    grad: Tensor,
    x_shard_s: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dx [..., S_r, K] and dw [N, K]: the input is gathered under dgrad, dx travels under wgrad."""
    if not all(needs):
        return plain_gather.plain_backward(grad, x_shard_s, weight, group, sizes, needs)
    count = x_shard_s.shape[:-2].numel()
    pipeline = all_gather_linear_backward_pipeline(
        _rank_by_rank(grad, sizes),
        x_shard_s.reshape(-1, x_shard_s.shape[-1]),
        weight,
        plan=_plan("all_gather_linear", weight, group, [count * size for size in sizes]),
        link=NcclLink(group.communicator),
        reduce=reduce_on_gpu,
    )
    streams_of(group.communicator).run(pipeline)
    dx, dw = pipeline.results
    return dx.view(x_shard_s.shape), dw


@backend.register("linear_reduce_scatter_backward", "cuda", supports=_reason_against_backward)
def linear_reduce_scatter_backward(
    grad: Tensor,
    x_shard_k: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [..., S, K_r], dw [N, K_r], db [N]: chunks of the gradient are multiplied as they land."""
    if not all(needs[:2]):
        return plain_scatter.plain_backward(grad, x_shard_k, weight, group, sizes, needs)
    lead, columns = grad.shape[:-2], grad.shape[-1]
    gathered = grad.new_empty(lead.numel() * sum(sizes), columns)
    pipeline = linear_reduce_scatter_backward_pipeline(
        grad.reshape(-1, columns),
        _rank_by_rank(x_shard_k, sizes),
        weight,
        plan=_plan("linear_reduce_scatter", weight, group, [lead.numel() * size for size in sizes]),
        link=NcclLink(group.communicator),
        gathered=gathered,
    )
    streams_of(group.communicator).run(pipeline)
    dx, dw = pipeline.results
    db = bias_grad(gathered) if needs[2] else None
    return _join_tokens(dx, lead, sizes, x_shard_k.shape[-1]), dw, db


def _plan(operation: str, weight: Tensor, group: Group, rows: Sequence[int]) -> Plan:
    n, k = weight.shape
    pieces = PIECES.pieces(operation, m=sum(rows), k=k, n=n, size=group.size)
    return Plan(rank=group.rank, rows=tuple(rows), pieces=pieces)


def _rank_by_rank(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """[..., S, K] to rows [M, K] in which each rank's tokens are one piece of memory."""
    width = x.shape[-1]
    if x.shape[:-2].numel() == 1:
        return x.reshape(-1, width)
    return torch.cat([part.reshape(-1, width) for part in x.split(list(sizes), -2)])


def _join_tokens(y: Tensor, lead: torch.Size, sizes: Sequence[int], width: int) -> Tensor:
    """Rows [M, N], rank by rank, to [..., S, N]."""
    if lead.numel() == 1:
        return y.view(*lead, sum(sizes), width)
    parts = y.split([lead.numel() * size for size in sizes])
    shaped = [p.view(*lead, size, width) for p, size in zip(parts, sizes, strict=True)]
    return torch.cat(shaped, -2)
