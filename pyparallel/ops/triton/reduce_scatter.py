"""``reduce_scatter`` on Triton. No autograd."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyparallel.comm.group import Group
from pyparallel.kernels.collective.collectives import reduce_scatter
from pyparallel.ops.triton._peers import peers
from pyparallel.ops.triton._peers import sum_reason as reason  # noqa: F401


def run(flat: Tensor, group: Group, op: str = "sum", *, counts: Sequence[int]) -> Tensor:
    """This rank's part, of these lengths, of the sum of flat tensors."""
    with peers(flat, group, flat.numel() * flat.itemsize) as memory:
        return reduce_scatter(flat, memory, counts=counts)
