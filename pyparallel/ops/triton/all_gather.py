"""``all_gather`` on Triton. No autograd."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.kernels.collective.collectives import all_gather
from pyparallel.ops.triton._peers import peers
from pyparallel.ops.triton._peers import sum_reason as reason  # noqa: F401


def run(flat: Tensor, group: Group, *, counts: Sequence[int]) -> Tensor:
    """The ranks' flat parts, of these lengths, one after another."""
    with peers(flat, group, sum(counts) * flat.itemsize) as memory:
        return all_gather(flat, memory, counts=counts)
