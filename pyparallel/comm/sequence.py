"""The sequence axis cut over a group: the second to last axis, ``S`` of ``[..., S, H]``.

Rank r holds ``S_r = part_sizes(S, R)[r]`` consecutive tokens of every sequence. A shard does not tell
how long the whole is, so where the cut is uneven the length travels with the call.
"""

from __future__ import annotations

from torch import Tensor

from pyparallel.comm.collectives import all_gather, split
from pyparallel.comm.group import Group
from pyparallel.cut.shares import part_sizes


def sequence_sizes(length: int, group: Group) -> list[int]:
    """``[S_0 .. S_{R-1}]`` of ``length`` tokens.

    Raises:
        ValueError: fewer tokens than ranks.
    """
    if length < group.size:
        raise ValueError(
            f"sequence: expected at least {group.size} tokens, one for each rank, got {length}; "
            f"run sequences this short without sequence_parallel"
        )
    return part_sizes(length, group.size)


def shard_sizes(x_shard: Tensor, length: int | None, group: Group) -> list[int]:
    """The sizes of all ranks' shards, of which ``x_shard [..., S_r, H]`` is this rank's.

    Args:
        length: S; by default all shards are as long as this one.

    Raises:
        ValueError: the shard is not the one that a sequence of this length gives this rank.
    """
    held = _tokens(x_shard)
    if length is None:
        return [held] * group.size
    sizes = sequence_sizes(length, group)
    if sizes[group.rank] != held:
        raise ValueError(
            f"x: expected {sizes[group.rank]} of length={length} tokens on rank {group.rank} of "
            f"{group.size}, got {held}; cut it with split_sequence"
        )
    return sizes


def split_sequence(x: Tensor, group: Group) -> Tensor:
    """This rank's tokens of a replicated ``x [..., S, H]``; backward gathers the gradients."""
    return split(x, group, dim=-2, sizes=sequence_sizes(_tokens(x), group))


def gather_sequence(
    x_shard: Tensor, group: Group, *, length: int | None = None, grad: str = "split"
) -> Tensor:
    """All tokens ``[..., S, H]``, on every rank.

    Args:
        length: S; by default all shards are as long as this one.
        grad: "split" where every rank makes the same use of the result, "reduce_scatter" where each
            makes its own.
    """
    sizes = shard_sizes(x_shard, length, group)
    return all_gather(x_shard, group, dim=-2, sizes=sizes, grad=grad)


def _tokens(x: Tensor) -> int:
    if x.dim() < 2:
        raise ValueError(f"x: expected [..., S, H], got shape {tuple(x.shape)}")
    return x.shape[-2]
