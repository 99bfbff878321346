"""all_gather_linear and linear_reduce_scatter as registered operators, for torch.compile.

Eager code asks the table directly; a compiled graph calls these, which ask it when they run. So both
run on the same backend and give the same bits. A group is named by ``Group.handle``.

    all_gather_linear(Tensor x_shard_s, Tensor weight, Tensor? bias, SymInt[] sizes, int group) -> Tensor
    linear_reduce_scatter(Tensor x_shard_k, Tensor weight, Tensor? bias, SymInt[] sizes, int group)
        -> Tensor
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyparallel import backend
from pyparallel.comm.group import Group

_library = torch.library.Library("pyparallel", "FRAGMENT")
NAMES = ("all_gather_linear", "linear_reduce_scatter")


def call(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> Tensor:
    """``name`` of NAMES on the backend that the table finds, traced or not. No autograd."""
    if torch.compiler.is_compiling():
        operator = getattr(torch.ops.pyparallel, name)
        return operator(x, weight, bias, sizes, group.handle)
    return backend.call(name, x, weight, bias, group, sizes)


def _register(name: str) -> None:
    def real(
        x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int], group: int
    ) -> Tensor:
        return backend.call(name, x, weight, bias, Group.of_handle(group), list(sizes))

    def fake(
        x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int], group: int
    ) -> Tensor:
        length = sum(sizes) if name == "all_gather_linear" else sizes[Group.of_handle(group).rank]
        return x.new_empty(*x.shape[:-2], length, weight.shape[0])

    schema = "(Tensor x, Tensor weight, Tensor? bias, SymInt[] sizes, int group) -> Tensor"
    _library.define(name + schema)
    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyparallel::{name}", fake, lib=_library)


for _name in NAMES:
    _register(_name)
