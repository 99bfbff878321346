"""The overlapped linear layers on GPUs: schedules of `pyparallel.overlap` on CUDA streams.

Entered into the backend table as `all_gather_linear` and `linear_reduce_scatter` on `cuda`; the plain
functions of `pyparallel.ops` are what they fall to at small M, and what they equal bit for bit
(those of the backend `triton` where our Triton kernel multiplies).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.comm.group import Group
from pyparallel.native.cuda import extension as cuda_extension
from pyparallel.native.cuda.tuning import tuning
from pyparallel.ops import all_gather_linear as plain_gather
from pyparallel.ops import linear_reduce_scatter as plain_scatter
from pyparallel.ops.linear import bias_grad
from pyparallel.overlap.choice import Choice, ChoiceTable, choices
from pyparallel.overlap.cuda_links import link_of, streams_of
from pyparallel.overlap.machine import H100
from pyparallel.overlap.multiply import backward_linear, forward_linear, reason_against_triton
from pyparallel.overlap.pipelines import (
    Plan,
    all_gather_linear_backward_pipeline,
    all_gather_linear_pipeline,
    linear_reduce_scatter_backward_pipeline,
    linear_reduce_scatter_pipeline,
)


@lru_cache(maxsize=1)
def table() -> ChoiceTable:
    """Which way at which shape: what was measured here (`cuda_tuning`), else the model."""
    found = tuning()
    made = ChoiceTable(machine=replace(H100, **found.machine))
    made.add(found.overlap, source=found.source)
    return made


def reduce_on_gpu(parts: Tensor, out: Tensor) -> None:
    """parts [R, m, N] summed into out [m, N] by the kernel of csrc/cuda/kernels/rank_sum.h."""
    from pyparallel.native.cuda.ops import rank_sum

    if out.numel() > 0:
        rank_sum(parts, out)


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
    rows = [lead.numel() * size for size in sizes]
    plan, multiplier = _plan("all_gather_linear", weight, group, rows)
    pipeline = all_gather_linear_pipeline(
        x_shard_s.reshape(-1, x_shard_s.shape[-1]),
        weight,
        plan=plan,
        link=link_of(group.communicator),
        linear=forward_linear(multiplier, bias),
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
    rows = [lead.numel() * size for size in sizes]
    plan, multiplier = _plan("linear_reduce_scatter", weight, group, rows)
    pipeline = linear_reduce_scatter_pipeline(
        _rank_by_rank(x_shard_k, sizes),
        weight,
        plan=plan,
        link=link_of(group.communicator),
        linear=forward_linear(multiplier),
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
    rows = [x_shard_s.shape[:-2].numel() * size for size in sizes]
    plan, multiplier = _plan("all_gather_linear", weight, group, rows)
    pipeline = all_gather_linear_backward_pipeline(
        _rank_by_rank(grad, sizes),
        x_shard_s.reshape(-1, x_shard_s.shape[-1]),
        weight,
        plan=plan,
        link=link_of(group.communicator),
        linear=backward_linear(multiplier),
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
    plan, multiplier = _plan(
        "linear_reduce_scatter", weight, group, [lead.numel() * size for size in sizes]
    )
    pipeline = linear_reduce_scatter_backward_pipeline(
        grad.reshape(-1, columns),
        _rank_by_rank(x_shard_k, sizes),
        weight,
        plan=plan,
        link=link_of(group.communicator),
        linear=backward_linear(multiplier),
    )
    streams_of(group.communicator).run(pipeline)
    dx, dw = pipeline.results
    db = bias_grad(pipeline.views["gathered"]()) if needs[2] else None
    return _join_tokens(dx, lead, sizes, x_shard_k.shape[-1]), dw, db


def available(
    weight: Tensor, rows: Sequence[int], *, addressable: bool, most_bytes: int
) -> tuple[Choice, ...]:
    """What a call may choose between; the same on all ranks.

    addressable: whether the ranks address one another's memory. most_bytes: what they may share of it.
    """
    transports, multipliers = ["direct"], ["library"]
    # Either a shard of the input travels, or the partial sums of all rows, forward or backward.
    if addressable and sum(rows) * max(weight.shape) * weight.itemsize <= most_bytes:
        transports.append("copy")
    if reason_against_triton(weight, tuple(rows)) is None:
        multipliers.append("triton")
    return choices(transports=transports, multipliers=multipliers)


def _plan(operation: str, weight: Tensor, group: Group, rows: Sequence[int]) -> tuple[Plan, str]:
    n, k = weight.shape
    among = available(
        weight,
        rows,
        addressable=group.communicator.peers is not None,
        most_bytes=tuning()["copy_bytes"],
    )
    choice = table().choose(operation, m=sum(rows), k=k, n=n, size=group.size, among=among)
    plan = Plan(group.rank, tuple(rows), choice.pieces, choice.transport)
    return plan, choice.multiplier


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
