"""Operators on sequence shards that torch.compile can trace.

Eager code runs at once; a compiled graph calls the operator, which runs the same. A group is named by
``Group.handle``.

    all_gather_linear(Tensor x_shard_s, Tensor weight, Tensor? bias, SymInt[] sizes, int group) -> Tensor
    linear_reduce_scatter(Tensor x_shard_k, Tensor weight, Tensor? bias, SymInt[] sizes, int group)
        -> Tensor
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyparallel.comm.group import Group

SequenceOp = Callable[[Tensor, Tensor, Tensor | None, Group, Sequence[int]], Tensor]

_library = torch.library.Library("pyparallel", "FRAGMENT")


def sequence_operator(
    name: str, run: SequenceOp, *, tokens: Callable[[Sequence[int], Group], int]
) -> SequenceOp:
    """``run``, registered as ``torch.ops.pyparallel.<name>`` for graphs. No autograd.

    Args:
        tokens: of every rank's S_r and the group, how many tokens the result has.
    """

    def real(
        x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int], group: int
    ) -> Tensor:
        return run(x, weight, bias, Group.of_handle(group), list(sizes))

    def fake(
        x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int], group: int
    ) -> Tensor:
        length = tokens(sizes, Group.of_handle(group))
        return x.new_empty(*x.shape[:-2], length, weight.shape[0])

    schema = "(Tensor x, Tensor weight, Tensor? bias, SymInt[] sizes, int group) -> Tensor"
    _library.define(name + schema)
    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyparallel::{name}", fake, lib=_library)

    def call(
        x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
    ) -> Tensor:
        if torch.compiler.is_compiling():
            return getattr(torch.ops.pyparallel, name)(x, weight, bias, sizes, group.handle)
        return run(x, weight, bias, group, sizes)

    return call


def rank_by_rank(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """[..., S, K] to rows [M, K] in which each rank's tokens are one piece of memory."""
    width = x.shape[-1]
    if x.shape[:-2].numel() == 1:
        return x.reshape(-1, width)
    return torch.cat([part.reshape(-1, width) for part in x.split(list(sizes), -2)])


def join_tokens(y: Tensor, lead: torch.Size, sizes: Sequence[int]) -> Tensor:
    """Rows [M, N], rank by rank, to [..., S, N]."""
    width = y.shape[-1]
    if lead.numel() == 1:
        return y.view(*lead, sum(sizes), width)
    parts = y.split([lead.numel() * size for size in sizes])
    shaped = [p.view(*lead, size, width) for p, size in zip(parts, sizes, strict=True)]
    return torch.cat(shaped, -2)
