"""The collectives as registered torch operators, which torch.compile can trace.

Eager code calls the communicator directly; under torch.compile the functions of
:mod:`pyparallel.comm.raw` become these operators. They name their group by ``Group.handle``,
since a graph holds numbers but no objects. Each has a fake kernel, which gives the shapes without
communication; the real one is the eager function, so that both make the same calls and count alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyparallel.comm import raw as raw
from pyparallel.comm.group import Group

_library = torch.library.Library("pyparallel", "FRAGMENT")


def _register(schema: str, real: Callable, fake: Callable) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyparallel::{name}", fake, lib=_library)


def _all_reduce_(x: Tensor, op: str, group: int) -> None:
    raw.all_reduce_raw(x, Group.of_handle(group), op=op)


def _all_gather(x_shard: Tensor, dim: int, sizes: Sequence[int], group: int) -> Tensor:
    return raw.all_gather_raw(x_shard, Group.of_handle(group), dim=dim, sizes=sizes)


def _reduce_scatter(x: Tensor, dim: int, sizes: Sequence[int], op: str, group: int) -> Tensor:
    return raw.reduce_scatter_raw(x, Group.of_handle(group), dim=dim, sizes=sizes, op=op)


def _all_to_all(
    x: Tensor,
    split_dim: int,
    join_dim: int,
    split_sizes: Sequence[int],
    join_sizes: Sequence[int],
    group: int,
) -> Tensor:
    return raw.all_to_all_raw(
        x,
        Group.of_handle(group),
        split_dim=split_dim,
        join_dim=join_dim,
        split_sizes=split_sizes,
        join_sizes=join_sizes,
    )


def _broadcast_(x: Tensor, src: int, group: int) -> None:
    raw.broadcast_raw(x, Group.of_handle(group), src=src)


def _with(x: Tensor, sizes: dict[int, int]) -> Tensor:
    """A new tensor of ``x``'s shape but for the axes in ``sizes``."""
    shape = [sizes.get(axis, size) for axis, size in enumerate(x.shape)]
    return x.new_empty(shape)


def _fake_in_place(x: Tensor, *_: object) -> None:
    return None


def _fake_all_gather(x_shard: Tensor, dim: int, sizes: Sequence[int], group: int) -> Tensor:
    return _with(x_shard, {dim: sum(sizes)})


def _fake_reduce_scatter(x: Tensor, dim: int, sizes: Sequence[int], op: str, group: int) -> Tensor:
    return _with(x, {dim: sizes[Group.of_handle(group).rank]})


def _fake_all_to_all(
    x: Tensor,
    split_dim: int,
    join_dim: int,
    split_sizes: Sequence[int],
    join_sizes: Sequence[int],
    group: int,
) -> Tensor:
    own = split_sizes[Group.of_handle(group).rank]
    return _with(x, {split_dim: own, join_dim: sum(join_sizes)})


_register("all_reduce_(Tensor(a!) x, str op, int group) -> ()", _all_reduce_, _fake_in_place)
_register(
    "all_gather(Tensor x_shard, int dim, SymInt[] sizes, int group) -> Tensor",
    _all_gather,
    _fake_all_gather,
)
_register(
    "reduce_scatter(Tensor x, int dim, SymInt[] sizes, str op, int group) -> Tensor",
    _reduce_scatter,
    _fake_reduce_scatter,
)
_register(
    "all_to_all(Tensor x, int split_dim, int join_dim, SymInt[] split_sizes, SymInt[] join_sizes,"
    " int group) -> Tensor",
    _all_to_all,
    _fake_all_to_all,
)
_register("broadcast_(Tensor(a!) x, int src, int group) -> ()", _broadcast_, _fake_in_place)
