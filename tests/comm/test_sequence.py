"""The sequence cut over the ranks and gathered again, and the gradients of both."""

from __future__ import annotations

import torch

from pyparallel.comm.group import Group
from pyparallel.comm.sequence import gather_sequence, sequence_sizes, split_sequence
from pyparallel.testing import assert_equal, integers, run_ranks

RANKS = [1, 2, 3, 4]


def gathers(group: Group) -> None:
    x = integers(2, 7, 3, seed=1).requires_grad_()
    dy = integers(2, 7, 3, seed=2)
    whole = gather_sequence(split_sequence(x, group), group, length=7)
    assert_equal(whole, x, "gathered")
    (grad,) = torch.autograd.grad(whole, x, dy)
    assert_equal(grad, dy, "gradient of a replicated use")
    part = split_sequence(x, group)
    whole = gather_sequence(part, group, length=7, grad="reduce_scatter")
    (grad,) = torch.autograd.grad(whole, part, dy * (group.rank + 1))
    summed = dy * sum(range(1, group.size + 1))
    expected = summed.split(sequence_sizes(7, group), -2)[group.rank]
    assert_equal(grad, expected, "gradient of uses that differ")


def test_split_and_gather():
    for ranks in RANKS:
        run_ranks(gathers, ranks)
