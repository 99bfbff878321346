"""The overlapped linear layers on GPUs: which way a call of `pyparallel.overlap` takes.

The rows have the bits of the ops' parts, also where they take the plain way, at small M; those of the
parts on the backend `triton` where our Triton kernel multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from pyparallel.comm.cuda.engine import NcclCommunicator
from pyparallel.comm.group import Group
from pyparallel.cut.shares import are_equal
from pyparallel.native import FLOATS
from pyparallel.native.cuda.tuning import tuning
from pyparallel.overlap.choice import Choice, ChoiceTable, choices
from pyparallel.overlap.machine import H100
from pyparallel.overlap.multiply import reason_against_triton
from pyparallel.overlap.pipelines import Plan


@lru_cache(maxsize=1)
def table() -> ChoiceTable:
    """Which way at which shape: what was measured here (`cuda_tuning`), else the model."""
    found = tuning()
    made = ChoiceTable(machine=replace(H100, **found.machine))
    made.add(found.overlap, source=found.source)
    return made


def reason_against(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, sizes: Sequence[int]
) -> str | None:
    """Why a call can't run here, or None."""
    if not isinstance(group.communicator, NcclCommunicator):
        return f"the group '{group.communicator.name}' does not run on our NCCL communicator"
    if not are_equal(group.shares):
        return (
            f"ranks of shares {group.shares} have other shapes, and could choose another way each"
        )
    if x.dtype != weight.dtype or x.dtype not in FLOATS:
        return f"dtypes {x.dtype} and {weight.dtype} are not one float type"
    return None


def backward_reason(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    group: Group,
    sizes: Sequence[int],
    needs: tuple[bool, ...],
) -> str | None:
    """Why a backward can't run here, or None."""
    if not all(needs[:2]):
        return "of one gradient alone nothing is overlapped"
    return reason_against(grad, weight, None, group, sizes)


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


def plan_of(operation: str, weight: Tensor, group: Group, rows: Sequence[int]) -> tuple[Plan, str]:
    """How to run a call whose ranks have ``rows`` rows, and what multiplies."""
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
